"""A batch that grows during the run, at one shape: the number of micro-batches grows, not their size.

The step processes micro-batch j = rows j, j + n, j + 2n, ... of the batch. A batch of fewer rows fills the first
micro-batches, and the step stops after those; the other rows are zeros, of weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.errors import UserError

BatchSchedule = Sequence[tuple[int, int]]


def check_schedule(schedule: BatchSchedule, batch_size: int, microbatches: int) -> None:
    """Raises UserError unless every batch of the schedule fills whole micro-batches."""
    size = batch_size // microbatches
    for _, sequences in schedule:
        if sequences < 1 or sequences > batch_size or sequences % size:
            raise UserError(
                f"batch_schedule has a batch of {sequences} sequences, which is not a multiple of a micro-batch "
                f"({batch_size} / microbatches={microbatches} = {size}) up to batch_size={batch_size}."
            )


def rows_before(step: Array | int | float, schedule: BatchSchedule, batch_size: int) -> Array:
    """Rows in all batches before `step` (float32): the schedule summed."""
    step = jnp.asarray(step, jnp.float32)
    total, start = jnp.zeros_like(step), 0
    for until, sequences in schedule:
        total += jnp.clip(step - start, 0, until - start) * sequences
        start = until
    return total + jnp.maximum(step - start, 0) * batch_size


def rows_at(step: Array, schedule: BatchSchedule, batch_size: int) -> Array:
    """Rows in the batch of a step."""
    size = jnp.full_like(step, batch_size)
    for until, sequences in reversed(list(schedule)):
        size = jnp.where(step < until, sequences, size)
    return size


class RampedSource:
    """Serves a source whose batches have different numbers of rows at the one shape of the largest."""

    def __init__(self, source: Any, microbatches: int) -> None:
        self.source, self.microbatches = source, microbatches

    def spec(self) -> dict[str, Any]:
        return self.source.spec()

    def batch_size(self, step: int) -> int:
        return next(iter(self.spec().values())).shape[0]

    def rows(self, step: int, rows: slice) -> dict[str, np.ndarray]:
        n, full, present = self.microbatches, self.batch_size(step), self.source.batch_size(step)
        start, stop = rows.start or 0, full if rows.stop is None else rows.stop
        at = np.arange(start, stop)
        wanted = (at % n) * (full // n) + at // n  # the row of the source that this place of the batch holds
        out = {k: np.zeros((len(at), *s.shape[1:]), s.dtype) for k, s in self.spec().items()}
        for residue in range(n):
            mine = np.flatnonzero((at % n == residue) & (wanted < present))
            if len(mine):
                part = self.source.rows(step, slice(int(wanted[mine[0]]), int(wanted[mine[-1]]) + 1))
                for name, values in part.items():
                    out[name][mine] = values
        return out
