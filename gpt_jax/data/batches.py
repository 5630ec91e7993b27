"""Closed forms from the step to the rows of its batch.

    step -> batch index (skipped ranges jumped over) -> first row (batch sizes summed) -> (epoch, i) -> permutation of i

Nothing here has state: the batch at a step is a function of (config, seed, step), and so is every row of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpt_jax.data.formats import Arrays
from gpt_jax.data.permutation import mix, permute
from gpt_jax.data.rows import RowMaker, Rows, StreamRows
from gpt_jax.data.store import Split
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class BatchOrder:
    """Which rows a step reads.

    Attributes:
      batch_size: rows of a batch once the schedule is over.
      schedule: ((until, rows), ...): batches with an index below `until` have that many rows.
      skip: [from, to) ranges of batch indices that no step reads.
    """

    batch_size: int
    schedule: tuple[tuple[int, int], ...] = ()
    skip: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        for pair in self.skip:
            if len(pair) != 2 or not 0 <= pair[0] < pair[1]:
                raise UserError(f"data.skip has {tuple(pair)}; each is (from, to) with 0 <= from < to.")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; it must be at least 1.")

    @property
    def skipped(self) -> list[tuple[int, int]]:
        """The skipped ranges, in order and apart from each other."""
        return _merged(self.skip)

    def batch_index(self, step: int) -> int:
        """Returns the index of the batch that a step reads: the step-th that is not skipped."""
        index = step
        for start, stop in self.skipped:
            if index >= start:
                index += stop - start
        return index

    def rows_of_batch(self, index: int) -> int:
        """Returns the number of rows of a batch."""
        return next((rows for until, rows in self.schedule if index < until), self.batch_size)

    def rows_of_step(self, step: int) -> int:
        """Returns the number of rows of the batch that a step reads."""
        return self.rows_of_batch(self.batch_index(step))

    def first_row(self, index: int) -> int:
        """Returns the first row of a batch: the sizes of those before it summed."""
        total, start = 0, 0
        for until, rows in self.schedule:
            if index <= start:
                break
            total += (min(index, until) - start) * rows
            start = until
        return total + max(0, index - start) * self.batch_size

    def rows_before(self, step: int) -> int:
        """Returns the number of rows in the batches of all steps before a step."""
        index = self.batch_index(step)
        skipped = (self.first_row(min(b, index)) - self.first_row(min(a, index)) for a, b in self.skipped)
        return self.first_row(index) - sum(skipped)

    def rows(self, step: int, rows: slice) -> np.ndarray:
        """Returns the numbers of rows [rows.start, rows.stop) of the batch of a step, int64."""
        index = self.batch_index(step)
        size = self.rows_of_batch(index)
        start, stop, _ = rows.indices(size)
        return self.first_row(index) + np.arange(start, stop, dtype=np.int64)


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return out


def resolve_batch_schedule(
    schedule: Sequence[tuple[str | int, int | Sequence[int]]],
    *,
    batch_size: int,
    context_length: int,
    steps: int,
    micro: int = 1,
    log: Callable[[str], None] | None = None,
) -> tuple[tuple[int, int], ...]:
    """Returns ((until batch index, rows), ...) of a schedule in steps ('200'), tokens ('375Mtok') or percent ('5%').

    A number of tokens is reached with the smaller batches that the schedule itself gives. A pair of sequences grows
    linearly from the first to the second (0: `batch_size`), in whole micro-batches.

    Args:
      micro: rows of a micro-batch. log: is told if a batch cannot start as small as the schedule says.

    Raises:
      UserError: a duration that cannot be read, batches out of order or larger than `batch_size`.
    """
    out: list[tuple[int, int]] = []
    for until, part, rows in _spelt_out(schedule, batch_size, micro, log):
        start = out[-1][0] if out else 0
        before = BatchOrder(rows, tuple(out)).first_row(start) * context_length
        text = str(until).strip().lower()
        match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*(%|([kmbgt]?)tok(?:ens)?)?", text)
        try:
            number = part * float(match[1])
        except (TypeError, ValueError):
            raise UserError(f"batch_schedule: cannot read {until!r}; write '200', '375Mtok' or '5%'.") from None
        if match[2] is None:
            index = round(number)
        elif match[2] == "%":
            index = round(number / 100 * steps)
        else:
            tokens = number * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}[match[3]]
            index = start + max(0, round((tokens - before) / (rows * context_length)))
        if index < start:
            raise UserError(f"batch_schedule: {until!r} comes before the entry above it.")
        if index > start:
            out.append((index, rows))
    return tuple(out)


def _spelt_out(
    schedule: Sequence[tuple[str | int, int | Sequence[int]]],
    batch_size: int,
    micro: int,
    log: Callable[[str], None] | None,
) -> Iterator[tuple[str | int, float, int]]:
    """Yields (until, the part of it that counts, rows): of a batch that grows, an entry for each size."""
    for number, (until, rows) in enumerate(schedule):
        grows = not isinstance(rows, int)
        first, last = (*rows, *(0, 0))[:2] if grows else (rows, rows)
        if grows and not last:  # a batch that is no larger than the first has nothing to grow to
            first, last = min(first, batch_size), batch_size
        if not 1 <= first <= last <= batch_size or (grows and (len(rows) != 2 or number)):
            raise UserError(
                f"batch_schedule has {rows} sequences; allowed: 1 to batch_size ({batch_size}), and in the first entry "
                "a pair (from, to) of such."
            )
        if not grows:
            yield until, 1.0, rows
            continue
        least = -(-first // micro) * micro
        if least > first and log:
            log(f"batch_schedule: batches start at {least} sequences, a whole micro-batch, and not at {first}")
        sizes = range(least, last, micro)
        if not sizes and last < batch_size:  # nothing to grow by: such a batch until then
            yield until, 1.0, last
        for size in sizes:
            yield until, min(1.0, (size + micro - first) / (last - first)), size


def batch_spec(batch_size: int, arrays: Arrays) -> dict[str, Any]:
    """Returns the shapes and dtypes of a batch of such rows (jax.ShapeDtypeStruct)."""
    import jax  # here, so that processes that only tokenize do without it

    return {name: jax.ShapeDtypeStruct((batch_size, *shape), kind) for name, (shape, kind) in arrays.items()}


class TrainSource:
    """Training batches of one text or task.

    Args:
      maker: its rows.
      order: which rows a step reads.
      seed: of the permutation of every epoch.
      name: of the text, for errors.
      whole: an epoch must fill a batch; the few examples of a task may come more than once in it.

    Raises:
      UserError: an epoch has fewer rows than a batch.
    """

    def __init__(self, maker: RowMaker, order: BatchOrder, seed: int, name: str = "the corpus", whole: bool = True):
        if whole and maker.rows_per_epoch < order.batch_size:
            raise UserError(
                f"{name} yields {maker.rows_per_epoch} rows of {maker.length} tokens, fewer than one batch of "
                f"{order.batch_size}; use more text, a smaller batch_size or a shorter context_length."
            )
        self.maker, self.order, self.seed = maker, order, seed
        self.rows_per_epoch = maker.rows_per_epoch

    def spec(self) -> dict[str, Any]:
        return batch_spec(self.order.batch_size, self.maker.arrays)

    def batch_size(self, step: int) -> int:
        """Rows of the batch of a step."""
        return self.order.rows_of_step(step)

    def rows(self, step: int, rows: slice) -> Rows:
        """Returns rows [start:stop) of the global batch of a step, arrays [stop - start, T]."""
        return pick(self.maker, self.order.rows(step, rows), self.seed)


def pick(maker: RowMaker, numbers: np.ndarray, seed: int) -> Rows:
    """Returns the rows with these numbers, counted over all epochs, each epoch in its own order."""
    epochs, places = np.divmod(numbers, maker.rows_per_epoch)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        indices[here] = permute(places[here], maker.rows_per_epoch, mix(seed, epoch, 2))
    return maker.build(epochs, indices)


class ValidSource:
    """Batches that cover a text or a task once, in its order; the last is filled up with rows of zeros, weights too.

    Args:
      maker: its rows, unmoved (seed None). rows_per_batch: B.

    Attributes:
      num_batches: of the whole split. part: the part of a mixture that it is for; "" is the objective itself.
      bytes: of the original text whose tokens are targets; 0 where bits per byte mean nothing.
    """

    def __init__(self, maker: RowMaker, rows_per_batch: int, part: str = ""):
        self.maker, self._rows, self.part = maker, rows_per_batch, part
        self.rows_per_epoch = maker.rows_per_epoch
        self.num_batches = -(-maker.rows_per_epoch // rows_per_batch)
        self.bytes = 0

    def spec(self) -> dict[str, Any]:
        return batch_spec(self._rows, self.maker.arrays)

    def batch_size(self, step: int) -> int:
        return self._rows

    def rows(self, step: int, rows: slice) -> Rows:
        """Returns rows [start:stop) of batch `step`, arrays [stop - start, ...]."""
        start, stop, _ = rows.indices(self._rows)
        numbers = step * self._rows + np.arange(start, stop, dtype=np.int64)
        real = numbers[numbers < self.rows_per_epoch]
        out = self._real_rows(real)
        return {
            k: np.concatenate([v, np.zeros((len(numbers) - len(real), *v.shape[1:]), v.dtype)]) for k, v in out.items()
        }

    def _real_rows(self, numbers: np.ndarray) -> Rows:
        return self.maker.build(np.zeros_like(numbers), numbers)


class ValidText(ValidSource):
    """Batches that cover a text once, every token predicted exactly once (with an EOT: all tokens and the EOT that ends
    each document; without: all but the very first).

    Args:
      split: the text. maker: its rows, unmoved (seed None). rows_per_batch: B.
      tokenizer: knows how many bytes a token stands for. part: see ValidSource.

    Attributes:
      num_targets: of the whole split.
    """

    def __init__(self, split: Split, maker: RowMaker, rows_per_batch: int, tokenizer: Tokenizer, part: str = ""):
        super().__init__(maker, rows_per_batch, part)
        self.split = split
        self._lengths, self._lossless = np.array(tokenizer.byte_lengths, np.int64), tokenizer.lossless
        self._unk, self._unk_nats = tokenizer.unk, tokenizer.unk_nats
        self._counted: dict[int, tuple[int, int, int]] = {}
        missed = 0
        if split.eot is None:
            firsts = split.starts if "segment_ids" in maker.arrays else split.starts[:1]
            missed = int(self._lengths[np.asarray(split.tokens[np.asarray(firsts, np.int64)])].sum())
        self.bytes = split.num_bytes - missed

    @property
    def num_targets(self) -> int:
        return self._count(self.num_batches)[0]

    def _real_rows(self, numbers: np.ndarray) -> Rows:
        out = super()._real_rows(numbers)
        if self.split.eot is None and isinstance(self.maker, StreamRows):
            # The stream's first token would be predicted from its last.
            row, column = divmod(self.split.num_tokens - 1, self.maker.length)
            out["target_weights"][numbers == row, column] = 0
        return out

    def bytes_in(self, num_batches: int) -> int:
        """Returns the bytes of text that the first `num_batches` batches predict.

        Exact for a lossless tokenizer and for the whole split; else in proportion to the targets.
        """
        if num_batches >= self.num_batches:
            return self.bytes
        if self._lossless:
            return self._count(num_batches)[1]
        return round(self.bytes * self._count(num_batches)[0] / max(1, self.num_targets))

    def unk_nats_in(self, num_batches: int) -> float:
        """Returns what to add to the summed loss of the first batches before vocabularies with <unk> are compared."""
        return self._count(min(num_batches, self.num_batches))[2] * self._unk_nats if self._unk is not None else 0.0

    def _count(self, num_batches: int) -> tuple[int, int, int]:
        """Targets, their bytes and how many are <unk>, in the first batches."""
        if num_batches not in self._counted:
            targets = size = unknown = 0
            for step in range(num_batches):
                batch = self.rows(step, slice(None))
                found = batch["targets"][batch["target_weights"] > 0]
                targets += len(found)
                size += int(self._lengths[found].sum())
                unknown += int((found == self._unk).sum()) if self._unk is not None else 0
            self._counted[num_batches] = (targets, size, unknown)
        return self._counted[num_batches]
