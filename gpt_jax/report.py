"""The report of a run: what was trained on what, how well, how fast, with its loss curve and samples."""

from __future__ import annotations

import io
import json
import math
import os
import pathlib
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpt_jax.config import resolve
from gpt_jax.errors import UserError
from gpt_jax.files import atomic_write
from gpt_jax.metrics import best, read_rows
from gpt_jax.model.size import count_parameters
from gpt_jax.report_page import report_page
from gpt_jax.workdir import Workdir

_BASELINE_NAMES = {"xz": "xz -9", "unigram": "unigram model", "uniform": "uniform over bytes"}


def write_report(
    workdir: str | os.PathLike,
    evaluation: Mapping[str, float] | None = None,
    baselines: Mapping[str, float] | None = None,
) -> pathlib.Path:
    """Writes report.md with loss.png and the self-contained report.html into a run directory, from what lies there.

    Args:
      workdir: the run directory; it needs config.json and metrics.jsonl.
      evaluation: the final evaluation, e.g. {'loss': nats per token, 'perplexity': ..., 'bits_per_byte': ...}; names
        with a slash ('novels/loss') are of one source. None: evaluation.json if there is one.
      baselines: values of simple models on the same text, e.g. {'xz_bits_per_byte': 2.51}. None: baselines.json.

    Returns:
      The path of report.md.

    Raises:
      UserError: no config or no metrics there.
    """
    run = Workdir(workdir)
    tree = run.read_config()
    if tree is None:
        raise UserError(f"no run in {str(workdir)!r}: it has no config.json.")
    config, rows = resolve(tree), read_rows(run.metrics_path)
    evaluation = run.read_json("evaluation.json") if evaluation is None else evaluation
    baselines = run.read_json("baselines.json") if baselines is None else baselines
    environment = run.read_json("environment.json") or {}
    tokens = config.batch_size * config.context_length
    restarts = {0, *(e["step"] for e in run.history() if e["event"] == "resume")}
    sections = [
        f"# {config.name or run.path.name}",
        _summary(config, rows),
        "## Loss",
        "![Training and validation loss by step](loss.png)",
        "## Final evaluation",
        evaluation_table(evaluation or {}, baselines or {}) or "Not evaluated.",
        "## Training",
        _table(_training_values(config, rows, tokens, restarts)),
        "## Samples",
        _samples(run),
        "## Data",
        _table(_flat(environment.get("data", {}))) or "Not recorded.",
        "## Model",
        _table({"parameters": count_parameters(config.model)} | _flat(tree["model"])),
        "## Code and machine",
        _table(
            _flat(
                {
                    k: environment[k]
                    for k in ("code", "python", "platform", "devices", "packages", "variables", "start_seconds")
                    if k in environment
                }
            )
        )
        or "Not recorded.",
        "## History",
        _history(run),
        "## Config",
        f"```json\n{json.dumps(tree, indent=2)}\n```",
    ]
    loss = plot_loss(rows, tokens_per_step=tokens)
    atomic_write(run.path / "loss.png", loss)
    atomic_write(run.report_path, "\n\n".join(s for s in sections if s) + "\n")
    page = report_page(
        run,
        config,
        rows,
        summary=_summary(config, rows),
        loss_png=loss,
        evaluation=_cells(evaluation_table(evaluation or {}, baselines or {})),
        training=_training_values(config, rows, tokens, restarts),
        environment=environment,
    )
    atomic_write(run.path / "report.html", page.html())
    return run.report_path


def _cells(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without its rule."""
    lines = [line.strip("|").split("|") for line in table.splitlines()]
    return [[cell.strip() for cell in line] for number, line in enumerate(lines) if number != 1]


def plot_loss(rows: Sequence[Mapping[str, Any]], tokens_per_step: int = 0) -> bytes:
    """Draws the training loss (raw and smoothed) and the validation loss by step; returns a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = _series(rows, "train/loss")
    valid_steps, valid_losses = _series(rows, "valid/loss")
    if len(steps):
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="training, each step")
        smooth_steps, smooth = _smooth(steps, losses)
        axes.plot(smooth_steps, smooth, color="tab:blue", linewidth=1.6, label="training, mean of neighbours")
    if len(valid_steps):
        marker = "o" if len(valid_steps) <= 60 else None
        axes.plot(valid_steps, valid_losses, color="tab:orange", marker=marker, markersize=4, label="validation")
        low = int(np.argmin(valid_losses))
        axes.annotate(
            f"{valid_losses[low]:.3f}",
            (valid_steps[low], valid_losses[low]),
            textcoords="offset points",
            xytext=(0, 8),
            ha="right" if low == len(valid_steps) - 1 else "center",
            color="black",
        )
    both = np.concatenate([losses, valid_losses])
    if len(both):
        low, high = float(both.min()), float(np.percentile(both, 99.5))
        high = max(high, float(valid_losses.max())) if len(valid_losses) else high
        margin = 0.08 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
        axes.legend(loc="upper right")
    else:
        axes.text(0.5, 0.5, "no losses recorded", ha="center", va="center", transform=axes.transAxes)
    axes.set_xlabel("step" + (f" (of {tokens_per_step:,} tokens)" if tokens_per_step else ""))
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def evaluation_table(evaluation: Mapping[str, float], baselines: Mapping[str, float]) -> str:
    """Returns a markdown table: a row per source (the whole first), then the baselines, a column per metric.

    Args:
      evaluation: {'loss': 3.2, 'bits_per_byte': 1.9, 'novels/loss': 3.3, ...}.
      baselines: {'xz_bits_per_byte': 2.51, ...}: what stands before a metric's name is the baseline's.
    """
    table: dict[str, dict[str, float]] = {}
    for name, value in evaluation.items():
        parts = name.split("/")
        cut = parts.index("loss") if "loss" in parts else len(parts) - 1  # loss/<term> is a metric
        source, metric = "/".join(parts[:cut]), "/".join(parts[cut:])
        if isinstance(value, int | float):
            table.setdefault(source or "this model", {})[metric] = value
    metrics = list(dict.fromkeys(m for row in table.values() for m in row))
    for name, value in baselines.items():
        metric = next((m for m in ("bits_per_byte", *metrics) if name.endswith(f"_{m}")), None)
        if metric is None or not isinstance(value, int | float):
            continue
        baseline = name.removesuffix(f"_{metric}")
        table.setdefault(_BASELINE_NAMES.get(baseline, baseline), {})[metric] = value
        metrics = metrics if metric in metrics else [*metrics, metric]
    if not table:
        return ""

    def cell(row: Mapping[str, float], metric: str) -> str:
        if metric not in row:
            return ""
        return f"{row[metric]:,.0f}" if metric.rpartition("/")[2] == "tokens" else _show(row[metric])

    lines = ["| | " + " | ".join(m.replace("_", " ") for m in metrics) + " |", "|---" + "|---:" * len(metrics) + "|"]
    for source, row in table.items():
        lines.append(f"| {source} | " + " | ".join(cell(row, m) for m in metrics) + " |")
    return "\n".join(lines)


def _summary(config: Any, rows: Sequence[Mapping[str, Any]]) -> str:
    done = max((row["step"] for row in rows), default=0)
    model = config.model
    layers = f"{model.num_layers} layer{'s' * (model.num_layers != 1)}"
    text = (
        f"{count_parameters(model):,} parameters, {layers}, width {model.d_model}, context "
        f"{config.context_length}; objective {config.objective.get('name', '?')}; {done:,} of {config.steps:,} steps."
    )
    found = best(rows)
    if found:
        text += f" Least validation loss {found[1]:.4f}{_unit(rows)} at step {found[0]:,}."
    return text


def _unit(rows: Sequence[Mapping[str, Any]]) -> str:
    """The unit of the loss: none where several terms, weighted, make it up."""
    terms = {name for row in rows[-1:] for name in row if name.startswith("train/loss/")}
    return " nats per token" if len(terms) <= 1 else ""


def _training_values(
    config: Any, rows: Sequence[Mapping[str, Any]], tokens: int, starts: Iterable[int]
) -> dict[str, str]:
    timed = [row for row in rows if "perf/tokens_per_s" in row]
    compiling = {next((row["step"] for row in timed if row["step"] > start), None) for start in starts}
    settled = [row for row in timed if row["step"] not in compiling]

    def median(name: str) -> float | None:
        values = [row[name] for row in settled if math.isfinite(row.get(name, math.nan))]
        return statistics.median(values) if values else None

    done = max((row["step"] for row in rows), default=0)
    stall = [row["perf/stall"] * row["perf/step_ms"] for row in settled if {"perf/stall", "perf/step_ms"} <= row.keys()]
    spent = sum(row["perf/step_ms"] for row in settled if {"perf/stall", "perf/step_ms"} <= row.keys())
    rate, mfu = median("perf/tokens_per_s"), median("perf/mfu")
    values = {
        "steps": f"{done:,} of {config.steps:,}",
        "tokens": f"{done * tokens:,}" if not config.batch_schedule else "see batch_schedule",
        "tokens per second (median)": "n/a" if rate is None else f"{rate:,.0f}",
        "model FLOPs utilisation (median)": "n/a" if mfu is None else f"{100 * mfu:.1f}%",
        "time waiting for data": "n/a" if not spent else f"{100 * sum(stall) / spent:.2f}%",
    }
    last = next((row for row in reversed(rows) if "train/loss" in row), None)
    if last:
        values["last training loss"] = f"{last['train/loss']:.4f}{_unit(rows)}"
    return values


def _samples(run: Workdir) -> str:
    files = sorted(run.samples_path.glob("step_*.txt")) if run.samples_path.is_dir() else []
    if not files:
        return "None."
    text = files[-1].read_text(errors="replace").strip()[:3000]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"At step {int(files[-1].stem.removeprefix('step_')):,}:\n\n{fence}text\n{text}\n{fence}"


def _history(run: Workdir) -> str:
    lines = []
    for entry in run.history():
        changes = "; ".join(f"{k}: {old!r} -> {new!r}" for k, (old, new) in entry.get("changes", {}).items())
        lines.append(f"- {entry['time']} step {entry['step']:,}: {entry['event']}{' ' + changes if changes else ''}")
    return "\n".join(lines) or "None."


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, float), np.array(values, float)


def _smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over windows of about a hundredth of the run, at their middles."""
    width = max(1, len(values) // 100)
    if width == 1:
        return steps, values
    sums = np.cumsum(np.concatenate([[0.0], values]))
    return steps[width - 1 :] - (steps[width - 1 :] - steps[: len(steps) - width + 1]) / 2, (
        sums[width:] - sums[:-width]
    ) / width


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _table(values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    shown = {key: f"{value:,}" if type(value) is int else str(value) for key, value in values.items()}
    cells = [(key, text.replace("|", "\\|").replace("\n", " ")) for key, text in shown.items()]
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in cells)])


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.4g}"
    return str(value)
