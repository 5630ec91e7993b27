"""From finished cells (or runs started by hand) to numbers: curves, intervals, paired comparisons with a baseline."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpt_jax import statistics
from gpt_jax.ablation.cells import (
    DONE,
    FILE,
    MISMATCHED,
    Status,
    check_data,
    data_hash,
    final_values,
    status_of,
)
from gpt_jax.ablation.grid import Ablation, Cell
from gpt_jax.config import Config, resolve
from gpt_jax.config_changes import FREE, classify, flatten
from gpt_jax.data.batches import BatchOrder
from gpt_jax.errors import UserError
from gpt_jax.metrics import read_rows
from gpt_jax.run import order_of
from gpt_jax.throughput import model_flops_per_token

ALPHA = 0.05


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run of an arm under a seed.

    Attributes:
      values: final ones by metric. rows: of metrics.jsonl. tokens_per_step, flops_per_step: of an update on a whole
        batch. flops_before: of the run it started from. order: which batches are smaller; None: all are alike.
    """

    values: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]
    tokens_per_step: int
    flops_per_step: float | None
    flops_before: float = 0.0
    order: BatchOrder | None = None

    def tokens(self, steps: Any) -> np.ndarray:
        """Tokens in the batches of so many steps."""
        return self._batches(steps) * self.tokens_per_step

    def flops(self, steps: Any) -> np.ndarray | None:
        """Compute of so many steps and of the run before; a smaller batch costs its part of a whole one."""
        return None if self.flops_per_step is None else self._batches(steps) * self.flops_per_step + self.flops_before

    def _batches(self, steps: Any) -> np.ndarray:
        """The whole batches that hold as many rows as those of so many steps (of a part of a step, that part)."""
        steps, order = np.asarray(steps, float), self.order
        if order is None:
            return steps
        whole = [int(step) for step in steps.ravel()]
        rows = [order.rows_before(n) + (s - n) * order.rows_of_step(n) for n, s in zip(whole, steps.flat, strict=True)]
        return np.array(rows, float).reshape(steps.shape) / order.batch_size

    def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a column."""
        points = [(row["step"], row[metric]) for row in self.rows if math.isfinite(row.get(metric, math.nan))]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, float), np.array(values, float)

    def seconds(self) -> tuple[np.ndarray, np.ndarray]:
        """(steps, seconds spent in updates up to them); the first, which compiles, counts as the second does."""
        steps, milliseconds = self.curve("perf/step_ms")
        if len(milliseconds) > 1:
            milliseconds[0] = milliseconds[1]
        gaps = np.diff(steps, prepend=0.0)
        return steps, np.cumsum(milliseconds * gaps) / 1e3


@dataclasses.dataclass(frozen=True)
class Study:
    """All that a report is made of.

    Attributes:
      results: {arm: {seed: Result}}, arms in order. baseline: the arm compared with. metrics: what is compared.
      missing, mismatched: (cell's name, why). changes: {arm: what it changes}. against: see Ablation.
      versions: how many cells each version of the code ran.
    """

    title: str
    question: str
    results: Mapping[str, Mapping[int, Result]]
    baseline: str
    metrics: tuple[str, ...]
    missing: Sequence[tuple[str, str]] = ()
    mismatched: Sequence[tuple[str, str]] = ()
    changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    reading: str = ""
    against: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def compared_with(self, arm: str) -> Sequence[str]:
        """The arms that an arm is tested against, the first that has the metric; () if others are tested against it."""
        others = {other for several in self.against.values() for other in several}
        return self.against.get(arm, () if arm == self.baseline or arm in others else (self.baseline,))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An arm's metric beside another's.

    Attributes:
      interval: of the arm, over its seeds. values: {seed: value}. dropped: seeds whose value is not finite.
      other: the arm it is compared with, "" for one that others are compared with.
      paired: differences on common seeds, None without any. gaps: those differences.
      p_holm: adjusted over the arms of this metric.
      seeds_needed: pairs that find a difference of the observed size at 80% power, at the level that Holm asks of the
        hardest case (alpha / number of arms).
    """

    arm: str
    interval: statistics.Interval
    values: Mapping[int, float]
    dropped: tuple[int, ...] = ()
    other: str = ""
    paired: statistics.Paired | None = None
    gaps: tuple[float, ...] = ()
    p_holm: float = math.nan
    seeds_needed: int | None = None

    @property
    def differs(self) -> bool:
        return self.p_holm <= ALPHA


def compare(study: Study, metric: str, confidence: float = 0.95) -> list[Comparison]:
    """Compares arms on one metric, each with the one it is set against; arms without a value of it are left out."""
    found = {arm: _finite(runs, metric) for arm, runs in study.results.items()}
    rows = []
    for arm, (values, dropped) in found.items():
        if not values and not dropped:
            continue
        interval = statistics.mean_interval(np.array(list(values.values()) or [np.nan]), confidence)
        paired, gaps = None, ()
        other = next((o for o in study.compared_with(arm) if found.get(o, ({},))[0]), "")
        base = found[other][0] if other else {}
        if common := [seed for seed in values if seed in base]:
            pairs = [[side[seed] for seed in common] for side in (values, base)]
            paired = statistics.paired_test(*pairs, confidence)
            gaps = tuple(a - b for a, b in zip(*pairs, strict=True))
        rows.append(Comparison(arm, interval, values, dropped, other, paired, gaps))
    tested = [row for row in rows if row.paired is not None]
    adjusted = statistics.holm([float(row.paired.p) for row in tested]) if tested else []
    for row, p in zip(tested, adjusted, strict=True):
        needed = statistics.seeds_needed(float(row.paired.effect), alpha=ALPHA / len(tested))
        rows[rows.index(row)] = dataclasses.replace(row, p_holm=float(p), seeds_needed=needed)
    return rows


def _finite(runs: Mapping[int, Result], metric: str) -> tuple[dict[int, float], tuple[int, ...]]:
    have = {seed: result.values[metric] for seed, result in runs.items() if metric in result.values}
    return (
        {seed: float(value) for seed, value in have.items() if math.isfinite(value)},
        tuple(seed for seed, value in have.items() if not math.isfinite(value)),
    )


def collect(ablation: Ablation, cells: Sequence[Cell], title: str) -> tuple[Study, list[Status]]:
    """Reads whatever has finished; cells of another config or of other data are named and left out."""
    statuses = check_data(cells, [status_of(cell) for cell in cells])
    results: dict[str, dict[int, Result]] = {arm: {} for arm in ablation.arms}
    missing, mismatched = [], []
    versions: collections.Counter[str] = collections.Counter()
    for cell, status in zip(cells, statuses, strict=True):
        if status.state == DONE:
            record = status.record
            code = record.get("code") or {}
            versions[code.get("commit", "unknown")[:12] + (" with changes" if code.get("dirty") else "")] += 1
            results[cell.arm][cell.seed] = Result(
                record["values"],
                read_rows(cell.path / "metrics.jsonl"),
                record["tokens_per_step"],
                record.get("flops_per_step"),
                record.get("flops_before", 0.0),
                order_of(cell.config),
            )
        else:
            (mismatched if status.state == MISMATCHED else missing).append((cell.name, status.why))
    study = Study(
        title,
        ablation.question,
        results,
        ablation.baseline,
        ablation.metrics,
        missing,
        mismatched,
        ablation.arms,
        ablation.reading,
        ablation.against,
        versions,
    )
    return study, statuses


def compare_runs(paths: Sequence[str], metrics: Sequence[str] = (), title: str = "comparison") -> Study:
    """A study of runs that were started by hand: arms are what their configs differ in (but for the seed). Those that
    have not finished are named and left out.

    Args:
      paths: run directories, the baseline's first. metrics: () takes all 'valid/...' that every run has.

    Raises:
      UserError: no run there, two runs of one arm and seed, or none that has finished.
    """
    flats, results, missing = [], [], []
    for path in map(pathlib.Path, paths):
        try:
            tree = json.loads((path / "config.json").read_text())
        except FileNotFoundError:
            raise UserError(f"--compare: {str(path)!r} holds no run: it has no config.json.") from None
        config = resolve(tree)
        rows = read_rows(path / "metrics.jsonl")
        step = max((row["step"] for row in rows), default=0)
        results.append((config.seed, _result(path, config, rows) if step >= config.steps else None))
        if step < config.steps:
            missing.append((str(path), f"not finished: step {step} of {config.steps}"))
        flat = {key: value for key, value in flatten(tree).items() if classify(key)[0] != FREE and key != "seed"}
        flats.append(flat | {"data (hash)": data_hash(path)})
    keys = sorted({key for flat in flats for key in flat if any(f.get(key) != flats[0].get(key) for f in flats)})
    if "data (hash)" in keys and any(key.startswith("data.") for key in keys):
        keys.remove("data (hash)")  # it differs because a key of the data does
    arms: dict[str, dict[int, Result]] = {}
    changes: dict[str, dict[str, Any]] = {}
    for path, flat, (seed, result) in zip(paths, flats, results, strict=True):
        own = {key: flat.get(key) for key in keys}
        arm = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in own.items()) or "one config"
        changes[arm] = own
        if seed in arms.setdefault(arm, {}):
            raise UserError(f"--compare: {path} has the config and the seed ({seed}) of another run given.")
        if result is not None:
            arms[arm][seed] = result
    every = list(itertools.chain.from_iterable(runs.values() for runs in arms.values()))
    if not every:
        raise UserError(f"--compare: no run is finished ({'; '.join(f'{name}: {why}' for name, why in missing)}).")
    shared = [n for n in every[0].values if n.startswith("valid/") and all(n in r.values for r in every)]
    chosen = tuple(metrics) or tuple(sorted(shared, key=lambda n: (n != "valid/loss", n)))
    return Study(title, "How do these runs compare?", arms, next(iter(arms)), chosen, missing, changes=changes)


def _result(path: pathlib.Path, config: Config, rows: Sequence[Mapping[str, Any]]) -> Result:
    """A finished run that was started by hand, or a cell."""
    values = final_values(path, max(row["step"] for row in rows))
    flops, before = None, 0.0
    if (path / FILE).exists():
        record = json.loads((path / FILE).read_text())
        flops, before = record.get("flops_per_step"), record.get("flops_before", 0.0)
    tokens = config.batch_size * config.context_length
    if flops is None:
        flops = tokens * _formula(config)
    return Result(values, rows, tokens, flops, before, order_of(config))


def _formula(config: Config) -> float:
    from gpt_jax.model.size import count_parameters

    model = config.model
    return model_flops_per_token(count_parameters(model), model.num_layers, model.d_model, config.context_length)
