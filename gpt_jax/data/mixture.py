"""A weighted mixture of texts: the source of a row and its index there are closed forms of the row's number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt_jax.data.batches import BatchOrder, batch_spec, pick
from gpt_jax.data.permutation import mix, permute
from gpt_jax.data.rows import RowMaker, Rows
from gpt_jax.errors import UserError

LARGEST_BLOCK = 10_000


def block_counts(weights: Sequence[float]) -> np.ndarray:
    """Returns how many rows of each source a block has, int64 [n]: the weights themselves, or their best rounding.

    Whole weights with a sum of at most 10,000 are kept exactly (divided by their greatest common divisor); others
    are rounded to ten-thousandths by largest remainders, at least 1 for a weight above 0.

    Raises:
      UserError: a weight is negative or not finite, or all are 0.
    """
    values = np.asarray(weights, np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise UserError(f"data.sources: weights must be numbers >= 0, not all 0; they are {list(weights)}.")
    if (values == values.round()).all() and values.sum() <= LARGEST_BLOCK:
        whole = values.astype(np.int64)
        return whole // np.gcd.reduce(whole)
    exact = values / values.sum() * LARGEST_BLOCK
    counts = np.floor(exact).astype(np.int64)
    short = LARGEST_BLOCK - counts.sum()
    counts[np.argsort(-(exact - counts), kind="stable")[:short]] += 1
    return np.where(values > 0, np.maximum(counts, 1), 0)


def assign(rows: np.ndarray, counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (source, index within it) of rows, int64 [n] each.

    Rows come in blocks of sum(counts); every block holds counts[k] rows of source k in an order of its own. So the
    proportions are exact in every block, and the indices of a source are 0, 1, 2, ...: none left out, none twice.
    """
    size = int(counts.sum())
    blocks, places = np.divmod(np.asarray(rows, np.int64), size)
    shuffled = np.empty_like(places)
    for block in np.unique(blocks).tolist():
        here = blocks == block
        shuffled[here] = permute(places[here], size, mix(seed, block, 3))
    ends = np.cumsum(counts)
    source = np.searchsorted(ends, shuffled, side="right")
    return source, blocks * counts[source] + shuffled - (ends - counts)[source]


class MixtureSource:
    """Training batches drawn from several texts or tasks in fixed proportions, each without replacement.

    Args:
      makers: rows of each, all of one shape.
      weights: of each.
      names: of each, for errors.
      order: which rows a step reads.
      seed: of all permutations.
      whole: together they must fill a batch without repetition; the few examples of tasks may repeat.

    Raises:
      UserError: bad weights, or all texts together yield fewer rows than a batch.
    """

    def __init__(
        self,
        makers: Sequence[RowMaker],
        weights: Sequence[float],
        names: Sequence[str],
        order: BatchOrder,
        seed: int,
        whole: bool = True,
    ):
        self.makers, self.names, self.order, self.seed = list(makers), list(names), order, seed
        self.weights, self.counts = list(weights), block_counts(weights)
        self.rows_per_epoch = sum(m.rows_per_epoch for m in makers)
        if whole and self.rows_per_epoch < order.batch_size:
            raise UserError(
                f"the sources {', '.join(names)} yield {self.rows_per_epoch} rows, fewer than one batch of "
                f"{order.batch_size}."
            )

    def spec(self) -> dict[str, Any]:
        return batch_spec(self.order.batch_size, self.makers[0].arrays)

    def batch_size(self, step: int) -> int:
        return self.order.rows_of_step(step)

    def sources(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """Returns the number of the source of each row, int64 [n]."""
        return assign(self.order.rows(step, rows), self.counts, self.seed)[0]

    def rows(self, step: int, rows: slice) -> Rows:
        """Returns rows [start:stop) of the global batch of a step, arrays [stop - start, T]."""
        numbers = self.order.rows(step, rows)
        source, index = assign(numbers, self.counts, self.seed)
        out: Rows = {}
        for k in np.unique(source).tolist():
            here = source == k
            for name, values in pick(self.makers[k], index[here], mix(self.seed, k, 4)).items():
                out.setdefault(name, np.zeros((len(numbers), *values.shape[1:]), values.dtype))[here] = values
        return out
