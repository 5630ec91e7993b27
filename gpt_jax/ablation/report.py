"""The report of an ablation: tables with intervals and paired tests, and figures, as Markdown and as one HTML file."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt_jax import statistics
from gpt_jax.ablation.results import ALPHA, Comparison, Result, Study, compare
from gpt_jax.pages import Page, new_figure, png_of

_UNITS = {
    "loss": "nats per token",
    "nll": "nats per token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy (fraction)",
}


def write_study(study: Study, folder: pathlib.Path) -> tuple[dict[str, pathlib.Path], dict[str, Any]]:
    """Writes report.md (pictures beside it) and report.html into `folder`; returns (paths, the numbers in them)."""
    folder.mkdir(parents=True, exist_ok=True)
    page, numbers = study_page(study)
    return page.write(folder, "report"), numbers


def study_page(study: Study) -> tuple[Page, dict[str, Any]]:
    """Returns the page of a study, and {metric: {arm: numbers}}."""
    page = Page(study.title)
    page.text(study.question)
    counts = [len(runs) for runs in study.results.values()]
    seeds = f"{counts[0]}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    page.text(
        f"{len(counts)} arms, {seeds} seeds each, which arms share: initial weights, order of the data, masks. "
        + ("" if study.against else f"Compared with **{study.baseline}**.")
    )
    if study.reading:
        page.text(study.reading)
    for what, cells in (("missing", study.missing), ("left out, for they do not match", study.mismatched)):
        if cells:
            page.warn(f"{len(cells)} cells {what}: " + "; ".join(f"{name} ({why})" for name, why in cells) + ".")
    if len(study.versions) > 1:
        shown = ", ".join(f"{name}: {count} cells" for name, count in study.versions.items())
        page.warn(f"Cells were run by several versions of the code ({shown}).")
    compared = {metric: compare(study, metric) for metric in study.metrics}
    compared = {metric: rows for metric, rows in compared.items() if rows}
    found = sorted({name for of_arm in study.results.values() for result in of_arm.values() for name in result.values})
    if absent := [metric for metric in study.metrics if found and metric not in found]:
        page.warn(f"No run has {', '.join(absent)}; they have {', '.join(found)}.")
    if not compared:
        page.text("Nothing to compare yet.")
        return page, {}
    page.heading("Reading")
    for metric, rows in compared.items():
        page.text(f"**{metric}**: {sentence(rows)}")
    for number, (metric, rows) in enumerate(compared.items()):
        page.heading(metric)
        page.table(*comparison_table(rows))
        page.picture(
            f"metric-{number}",
            plot_comparison(rows, metric),
            f"{metric}: each seed, the mean and its 95% interval; at the right the differences within seeds, filled "
            "where the arm differs.",
        )
    page.heading("Curves")
    metric = curve_metric(study, next(iter(compared)))
    page.picture(
        "curves",
        plot_curves(study, metric),
        f"{metric}, mean over seeds and their range, over steps, tokens, compute and training time.",
    )
    page.heading("Budgets")
    page.table(*budget_table(study))
    page.heading("Arms")
    page.table(
        ("arm", "what it changes"),
        [(arm, "; ".join(f"`{k}` = {v!r}" for k, v in own.items()) or "nothing") for arm, own in study.changes.items()],
    )
    page.heading("How to read this")
    page.text(METHOD)
    return page, {metric: {row.arm: _numbers(row) for row in rows} for metric, rows in compared.items()}


METHOD = (
    "Intervals are 95% Student intervals over seeds. The test is Student's paired t on differences within a seed; p "
    f"(Holm) is corrected over the arms of a metric, not over metrics. An arm **differs** where it is at most {ALPHA}. "
    "Not to differ is not to be equal: the interval of the difference says how large a difference these seeds leave "
    "open. 'Seeds needed' is how many pairs would find a difference of the observed size, in its observed scatter, in "
    "80% of experiments at the level that the strictest of Holm's tests "
    "asks; both are estimates from few seeds. Compute counts one step as traced, without recomputation (of a smaller "
    "batch its part), and the run that an arm starts from."
)


def sentence(rows: Sequence[Comparison]) -> str:
    """What differs beyond chance and what does not, in words."""
    parts, others = [], {row.other for row in rows if row.other}
    for row in rows:
        if row.paired is None:
            if row.dropped:
                parts.append(f"{row.arm} is not finite with seeds {', '.join(map(str, row.dropped))}")
            continue
        than = f" than {row.other}" if len(others) > 1 else ""
        d = row.paired.difference
        size = f"{float(d.mean):+.4g}"
        if row.dropped:
            size += f", without seeds {', '.join(map(str, row.dropped))}, which are not finite"
        if math.isnan(row.p_holm):
            parts.append(f"{row.arm}: {size} from one seed, which tests nothing")
        elif row.differs:
            parts.append(
                f"{row.arm} is {'lower' if d.mean < 0 else 'higher'}{than} ({size} [{d.low:+.4g}, {d.high:+.4g}])"
            )
        else:
            more = f"; a difference of that size would need {row.seeds_needed:,} seeds" if row.seeds_needed else ""
            than = than.replace(" than", " from")
            parts.append(f"{row.arm} does not differ{than} ({size} [{d.low:+.4g}, {d.high:+.4g}]{more})")
    return "; ".join(parts) + "." if parts else "nothing to compare."


def comparison_table(rows: Sequence[Comparison]) -> tuple[tuple[str, ...], list[tuple]]:
    several = len({row.other for row in rows if row.other}) > 1
    header = (
        "arm",
        "n",
        "mean",
        "95% interval",
        "difference from its own" if several else "difference",
        "its 95% interval",
        "p",
        "p (Holm)",
        "",
        "seeds needed",
    )
    out = []
    for row in rows:
        i = row.interval
        cells = [row.arm, i.n, float(i.mean), _range(i, "")]
        if row.paired is None:
            verdict = f"{len(row.dropped)} not finite" if row.dropped else "" if row.other else "compared with"
            out.append((*cells, None, "", None, None, verdict, None))
            continue
        d = row.paired.difference
        verdict = "" if math.isnan(row.p_holm) else ("**differs**" if row.differs else "does not differ")
        if row.dropped:
            verdict += f" ({len(row.dropped)} not finite)"
        if several:
            verdict += f" (from {row.other})"
        numbers = (f"{float(d.mean):+.4f}", _range(d, "+"), _p(row.paired.p), _p(row.p_holm))
        out.append((*cells, *numbers, verdict, row.seeds_needed))
    return header, out


def _range(i: statistics.Interval, sign: str) -> str:
    return "" if math.isnan(i.low) else f"[{i.low:{sign}.4f}, {i.high:{sign}.4f}]"


def _p(p: float) -> str:
    p = float(p)
    return "n/a" if math.isnan(p) else "<0.0001" if p < 1e-4 else f"{p:.4f}"


def budget_table(study: Study) -> tuple[tuple[str, ...], list[tuple]]:
    """What each arm spent: steps, tokens, compute and training seconds (mean over seeds)."""
    rows = []
    for arm, runs in study.results.items():
        if not runs:
            continue
        one = next(iter(runs.values()))
        steps = max((row["step"] for row in one.rows), default=0)
        seconds = [float(s[1][-1]) for r in runs.values() if len((s := r.seconds())[1])]
        flops = None if (spent := one.flops(steps)) is None else f"{float(spent) / 1e12:.3f}"
        mean = f"{sum(seconds) / len(seconds):.1f}" if seconds else ""
        rows.append((arm, steps, round(float(one.tokens(steps))), flops, mean))
    return ("arm", "steps", "tokens", "TFLOP", "training seconds"), rows


def _numbers(row: Comparison) -> dict[str, Any]:
    def clean(value: Any) -> float | None:
        value = float(value)
        return value if math.isfinite(value) else None

    i = row.interval
    out: dict[str, Any] = {"n": i.n, "mean": clean(i.mean), "low": clean(i.low), "high": clean(i.high)}
    if row.dropped:
        out["not_finite"] = list(row.dropped)
    if row.paired is not None:
        d = row.paired.difference
        out |= {
            "difference": clean(d.mean),
            "difference_low": clean(d.low),
            "difference_high": clean(d.high),
            "p": clean(row.paired.p),
            "p_holm": clean(row.p_holm),
            "differs": bool(row.differs),
            "seeds_needed": row.seeds_needed,
        }
    return out


def unit_of(metric: str) -> str:
    """The unit that a metric's name implies, or the name."""
    return _UNITS.get(metric.rpartition("/")[2], metric)


def plot_comparison(rows: Sequence[Comparison], metric: str) -> bytes:
    """Seeds, means and intervals by arm; beside them the paired differences. PNG."""
    height = 1.4 + 0.45 * len(rows)
    figure, (left, right) = new_figure(10.5, height, 1, 2, sharey=True)
    for y, row in enumerate(rows):
        color = f"C{y % 10}"
        left.plot(list(row.values.values()), [y] * len(row.values), "o", color=color, alpha=0.35, markersize=5)
        _bar(left, row.interval, y, color)
        if row.paired is not None:
            right.plot(row.gaps, [y] * len(row.gaps), "o", color=color, alpha=0.35, markersize=5)
            _bar(right, row.paired.difference, y, color, filled=row.differs)
    right.axvline(0, color="0.4", linewidth=1, linestyle="--")
    left.set_yticks(range(len(rows)), [_short(row.arm) for row in rows])
    left.invert_yaxis()
    left.set_xlabel(unit_of(metric))
    others = {row.other for row in rows if row.other}
    other = _short(next(iter(others))) if len(others) == 1 else "its own comparison"
    right.set_xlabel(f"difference from {other} ({unit_of(metric)})")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.margins(y=0.25 if len(rows) < 3 else 0.1)
    return png_of(figure)


def _bar(axes: Any, interval: statistics.Interval, y: int, color: str, filled: bool = True) -> None:
    if not math.isnan(interval.low):
        axes.plot([interval.low, interval.high], [y, y], color=color, linewidth=2.2, solid_capstyle="butt")
    axes.plot([interval.mean], [y], "D", color=color, markersize=7, markerfacecolor=color if filled else "white")


def _short(name: str, limit: int = 34) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def curve_metric(study: Study, metric: str) -> str:
    """The metric if it was measured along the runs, else the training loss."""
    runs = [result for found in study.results.values() for result in found.values()]
    return metric if runs and all(len(r.curve(metric)[0]) > 2 for r in runs) else "train/loss"


def plot_curves(study: Study, metric: str) -> bytes:
    """A metric over steps, tokens, compute and training seconds: mean over seeds, and their range. PNG."""
    figure, axes = new_figure(11, 7, 2, 2, sharey=True)
    labels = ("steps", "tokens (millions)", "compute (TFLOP)", "training seconds")
    shown: list[float] = []
    for number, (arm, runs) in enumerate(study.results.items()):
        curves = {seed: _smooth(*result.curve(metric)) for seed, result in runs.items()}
        curves = {seed: curve for seed, curve in curves.items() if len(curve[0])}
        if not curves:
            continue
        steps = min((c[0] for c in curves.values()), key=len)
        values = np.array([np.interp(steps, *curve) for curve in curves.values()])
        mean, color = values.mean(0), f"C{number % 10}"
        shown += [*values[:, len(steps) // 10 :].ravel()]
        for axis, x in zip(axes.flat, _positions(list(runs.values()), steps), strict=True):
            if x is None:
                continue
            axis.plot(x, mean, color=color, label=_short(arm), linewidth=1.6)
            axis.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.18, linewidth=0)
    for axis, label in zip(axes.flat, labels, strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel(unit_of(metric))
    if shown:
        low, high = min(shown), max(shown)
        axes[0, 0].set_ylim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))
        axes[0, 1].legend(fontsize=9)
    figure.suptitle(f"{metric}: mean over seeds and their range")
    return png_of(figure)


def _smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    width = max(1, len(values) // 40)
    if width == 1:
        return steps, values
    kernel = np.ones(width) / width
    return np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid")


def _positions(runs: Sequence[Result], steps: np.ndarray) -> tuple[np.ndarray | None, ...]:
    """`steps` as steps, millions of tokens, TFLOP and seconds."""
    one = runs[0]
    flops = one.flops(steps)
    timed = [r.seconds() for r in runs if len(r.seconds()[0])]
    seconds = np.mean([np.interp(steps, *t) for t in timed], axis=0) if timed else None
    return steps, one.tokens(steps) / 1e6, None if flops is None else flops / 1e12, seconds
