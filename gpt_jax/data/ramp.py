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

from gpt_jax.data.batches import BatchOrder
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


def rows_before(step: Array | int | float, order: BatchOrder) -> Array:
    """Rows in the batches of all steps before `step` (float32): the schedule summed, skipped batches left out."""
    index = _batch_index(jnp.asarray(step, jnp.float32), order)
    skipped = sum(
        (_rows_up_to(jnp.clip(index, a, b), order) - _rows_up_to(jnp.float32(a), order) for a, b in order.skipped),
        start=jnp.zeros_like(index),
    )
    return _rows_up_to(index, order) - skipped


def rows_at(step: Array, order: BatchOrder) -> Array:
    """Rows in the batch of a step."""
    index, size = _batch_index(step, order), jnp.full_like(step, order.batch_size)
    for until, sequences in reversed(order.schedule):
        size = jnp.where(index < until, sequences, size)
    return size


def _batch_index(step: Array, order: BatchOrder) -> Array:
    """`BatchOrder.batch_index` of a traced step."""
    for start, stop in order.skipped:
        step = jnp.where(step >= start, step + (stop - start), step)
    return step


def _rows_up_to(index: Array, order: BatchOrder) -> Array:
    """`BatchOrder.first_row` of a traced index."""
    total, start = jnp.zeros_like(index), 0
    for until, sequences in order.schedule:
        total += jnp.clip(index - start, 0, until - start) * sequences
        start = until
    return total + jnp.maximum(index - start, 0) * order.batch_size


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
