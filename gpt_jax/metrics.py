"""Metrics: a JSON row per step that survives any crash, mirrored to TensorBoard and Weights & Biases.

metrics.jsonl has one object a line, {"step": 42, "train/loss": 3.99, ...}, with everything measured at that step,
where step s counts optimizer updates done. Floats read back exactly. JSON has no infinities, so a value that is not
finite stands as the string "nan", "inf" or "-inf"; `read_rows` turns it back. Only `perf/*` differs between
identical runs.
"""

from __future__ import annotations

import collections
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.files import explain_no_space, replacing

WINDOW = 128  # values that a z-score looks back on, as llm.c's outlier detector
_SHORTEST = 16
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsWriter:
    """Writes the rows of a run.

    Args:
      path: metrics.jsonl; created, or continued.
      resume_step: the step that was restored: later rows and a torn last line are cut off. None keeps all whole rows.
      tensorboard: folder for TensorBoard's events; None is off.
      wandb: a Weights & Biases run (`open_wandb`); None is off.
      recent: columns whose last values are kept for `zscore`.
      kept: columns that are kept whole for `column`.
      writes: False keeps the columns but writes nothing (all but the first of several processes).

    Raises:
      UserError: a line before the last cannot be read, or no space is left on the device.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        resume_step: int | None = None,
        tensorboard: str | os.PathLike | None = None,
        wandb: Any = None,
        recent: Sequence[str] = ("train/loss", "train/grad_norm"),
        kept: Sequence[str] = ("valid/loss",),
        writes: bool = True,
    ) -> None:
        self.path = pathlib.Path(path)
        self._recent = {name: collections.deque(maxlen=WINDOW) for name in recent}
        self._kept: dict[str, dict[int, float]] = {name: {} for name in kept}
        self._pending: tuple[int, dict[str, Any]] | None = None
        self.last_step = -1  # of the rows begun
        limit = math.inf if resume_step is None else resume_step
        if writes:
            cut_rows(self.path, limit)
        for row in iterate_rows(self.path) if self.path.exists() else ():
            if row["step"] <= limit:
                self._remember(row)
        self._file = open(self.path, "ab", buffering=0) if writes else None
        self._events = _open_events(tensorboard, resume_step) if writes and tensorboard is not None else None
        self._wandb = wandb if writes else None

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds values to the row of `step`; the row is written when a later step begins, or by `flush`.

        Args:
          step: optimizer updates done; never less than before, and not one already flushed.
          values: numbers by name.
        """
        if self._pending is None or step > self._pending[0]:
            if step <= self.last_step:
                raise ValueError(f"the row of step {step} is written already (last: {self.last_step})")
            self._write_pending()
            self._pending = (step, {})
            self.last_step = step
        if step < self._pending[0]:
            raise ValueError(f"row {step} after row {self._pending[0]}")
        row = self._pending[1]
        double = [name for name in values if name in row]
        if double:
            raise ValueError(f"{double[0]!r} was added twice at step {step}")
        values = {name: _number(value) for name, value in values.items()}
        row.update(values)
        self._remember({"step": step, **values})

    def flush(self) -> None:
        """Makes all rows so far durable. Call it before the checkpoint of their last step is saved."""
        self._write_pending()
        if self._file is not None:
            with explain_no_space(self.path, self.path.name):
                os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flushes and closes everything."""
        self.flush()
        for out in (self._file, self._events):
            if out is not None:
                out.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def column(self, name: str) -> dict[int, float]:
        """Returns {step: value} of a kept column, from this and earlier parts of the run."""
        return dict(self._kept[name])

    def zscore(self, name: str) -> float | None:
        """Returns how many standard deviations the last value of a recent column lies above the mean. See `zscore`."""
        return zscore(self._recent[name])

    def _remember(self, row: Mapping[str, Any]) -> None:
        self.last_step = row["step"]
        for name, values in self._recent.items():
            if name in row:
                values.append(row[name])
        for name, column in self._kept.items():
            if name in row:
                column[row["step"]] = row[name]

    def _write_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None or not pending[1] or self._file is None:
            return
        step, values = pending
        with explain_no_space(self.path, self.path.name):
            line = format_row(step, values).encode()
            while line:
                line = line[self._file.write(line) :]
        if self._events is not None:
            for name, value in values.items():
                if math.isfinite(value):  # TensorBoard draws no others
                    self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)


def zscore(values: Iterable[float]) -> float | None:
    """Returns (last - mean) / std over the last 128 finite values, the last included.

    None while there are fewer than 16, if the last is not finite, or if all are equal.
    """
    values = list(values)[-WINDOW:]
    if not values or not math.isfinite(values[-1]):
        return None
    finite = np.array([v for v in values if math.isfinite(v)], np.float64)
    std = finite.std()
    if len(finite) < _SHORTEST or std == 0:
        return None
    return float((finite[-1] - finite.mean()) / std)


def best(rows: Iterable[Mapping[str, Any]], name: str = "valid/loss") -> tuple[int, float] | None:
    """Returns (step, value) of the row whose `name` is least, the earliest of equals; None if none is finite."""
    found = [(row[name], row["step"]) for row in rows if math.isfinite(row.get(name, math.nan))]
    if not found:
        return None
    value, step = min(found)
    return step, value


def format_row(step: int, values: Mapping[str, Any]) -> str:
    """Returns the line of metrics.jsonl, newline included, that `parse_row` reads back exactly."""
    row = {"step": int(step)}
    for name, value in values.items():
        value = _number(value)
        row[name] = value if math.isfinite(value) else ("nan" if math.isnan(value) else "inf" if value > 0 else "-inf")
    return json.dumps(row, allow_nan=False) + "\n"


def parse_row(line: str) -> dict[str, Any]:
    """Reads a line of metrics.jsonl; raises ValueError if it is not a whole row."""
    row = json.loads(line)
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError("not a row with a step")
    return {name: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}


def iterate_rows(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Yields the rows of a metrics.jsonl, except a last line that a crash has torn.

    Raises:
      UserError: no such file, or a line before the last cannot be read.
    """
    for _, row in _numbered_rows(path):
        yield row


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl as a list. See `iterate_rows`."""
    return list(iterate_rows(path))


def cut_rows(path: str | os.PathLike, last_step: float) -> None:
    """Removes a torn last line and the rows after `last_step`, atomically; the rows that stay keep their bytes."""
    path = pathlib.Path(path)
    if not path.exists():
        return
    end = 0
    for position, row in _numbered_rows(path):
        if row["step"] > last_step:
            break
        end = position
    if end == path.stat().st_size:
        return
    with explain_no_space(path, path.name), open(path, "rb") as old, replacing(path) as new:
        while end > 0:
            block = old.read(min(end, 1 << 20))
            new.write(block)
            end -= len(block)


def _numbered_rows(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (position after the row in bytes, row)."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"no metrics at {path}.") from None
    with file:
        position, bad = 0, None
        for number, line in enumerate(file, 1):
            if bad is not None:
                raise UserError(f"{path} is damaged: line {bad} is not a row of metrics; mend or delete that line.")
            position += len(line)
            try:
                row = parse_row(line.decode())
            except ValueError:
                bad = number
                continue
            if not line.endswith(b"\n"):  # cut exactly before its newline: not known to be whole
                return
            yield position, row


def _number(value: Any) -> int | float:
    if isinstance(value, bool | np.bool_):
        return int(value)
    if isinstance(value, int | np.integer):
        return int(value)
    return float(value)


def _open_events(folder: str | os.PathLike, resume_step: int | None) -> Any:
    import tensorboardX

    purge = None if resume_step is None else resume_step + 1
    suffix = f".{os.getpid()}.{resume_step or 0}"  # its names tell apart only writers opened in different seconds
    return tensorboardX.SummaryWriter(str(folder), purge_step=purge, flush_secs=30, filename_suffix=suffix)


def open_wandb(project: str, folder: str | os.PathLike, name: str, config: Mapping[str, Any]) -> Any:
    """Opens (or continues) the Weights & Biases run that belongs to a run directory.

    The run's id is kept in `folder`/wandb_id, so that a resumed run goes on in the same one.

    Raises:
      UserError: the package is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise UserError(f"log.wandb is {project!r}, but wandb is not installed: pip install -e '.[wandb]'.") from None
    id_file = pathlib.Path(folder) / "wandb_id"
    identity = id_file.read_text().strip() if id_file.exists() else None
    run = wandb.init(
        project=project, name=name or None, id=identity, dir=str(folder), config=dict(config), resume="allow"
    )
    if identity is None:
        with replacing(id_file) as file:
            file.write(run.id.encode())
    return run
