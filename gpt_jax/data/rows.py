"""Rows of T tokens: cut from one long stream, or holding whole documents."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from gpt_jax.data.formats import Arrays, TextRows
from gpt_jax.data.permutation import mix
from gpt_jax.data.store import Split

Rows = dict[str, np.ndarray]


def text_arrays(length: int, segments: bool) -> Arrays:
    """What a row of text holds: tokens, the next tokens, their weights, and where documents are kept apart which."""
    kinds = {"tokens": np.int32, "targets": np.int32, "target_weights": np.float32}
    kinds |= {"segment_ids": np.int32, "positions": np.int32} if segments else {}
    return {name: ((length,), kind) for name, kind in kinds.items()}


class RowMaker(Protocol):
    """Rows of one text or task. Row i of an epoch is the same whatever order it is read in.

    Attributes:
      rows_per_epoch: how many there are. length: T, tokens of a row. arrays: name -> (shape, dtype) of a row's arrays.
    """

    rows_per_epoch: int
    length: int
    arrays: Arrays

    def build(self, epochs: np.ndarray, indices: np.ndarray) -> Rows:
        """Returns rows `indices` [n] of `epochs` [n] as arrays [n, T]."""
        ...


class StreamRows:
    """Rows cut from one long stream EOT document EOT document ..., which is a circle.

    Row i of epoch e is T tokens from (offset(e) + i T) on; each predicts the one after it. So every token is a target
    exactly once in an epoch; the last row goes round to where the first began, and those targets have weight 0.

    With doc_mask, `segment_ids` number the documents of a row from 1 and `positions` restart at 0 with each and at the
    beginning of the row. The EOT that begins a document is also the end of the one before: it is predicted inside that
    one, by its last token, and is then the first token of its own. So no target crosses a boundary, all weights are
    1, and a packed document gives what it gives alone (EOT document -> document EOT). Without an EOT in the vocabulary
    the first token of a document would be predicted across the boundary: weight 0.

    Args:
      split: the text.
      length: T, tokens of a row.
      doc_mask: add segment_ids and positions.
      seed: of the offsets; None keeps them 0.
    """

    def __init__(self, split: Split, length: int, doc_mask: bool = False, seed: int | None = None):
        self.split, self.length, self.doc_mask, self.seed = split, length, doc_mask, seed
        self.rows_per_epoch = -(-split.num_tokens // length)
        self.arrays = text_arrays(length, segments=doc_mask)

    def offset(self, epoch: int) -> int:
        """Returns where epoch's first row begins."""
        return 0 if self.seed is None else mix(self.seed, epoch, 1) % self.split.num_tokens

    def build(self, epochs: np.ndarray, indices: np.ndarray) -> Rows:
        n, length, size = len(indices), self.length, self.split.num_tokens
        both = np.empty((n, length + 1), np.int32)
        weights = np.ones((n, length), np.float32)
        begins = np.zeros((n, length + 1), bool)
        for row, (epoch, i) in enumerate(zip(epochs.tolist(), indices.tolist(), strict=True)):
            start = (self.offset(epoch) + i * length) % size
            both[row] = self.split.read(start, length + 1)
            weights[row, max(0, size - i * length) :] = 0
            if self.doc_mask:
                begins[row] = self.split.begins(start, length + 1)
        out = {"tokens": both[:, :-1], "targets": both[:, 1:], "target_weights": weights}
        if self.doc_mask:
            if self.split.eot is None:
                weights[begins[:, 1:]] = 0
            out |= _segments(begins[:, :-1])
        return out


def _segments(begins: np.ndarray) -> Rows:
    """Returns segment_ids and positions [n, T] of rows whose documents begin where `begins` [n, T] is true."""
    begins = begins.copy()
    begins[:, 0] = True
    at = np.arange(begins.shape[1], dtype=np.int32)
    first = np.maximum.accumulate(np.where(begins, at, 0), axis=1)
    return {"segment_ids": np.cumsum(begins, axis=1, dtype=np.int32), "positions": (at - first).astype(np.int32)}


class PieceRows:
    """Rows that hold whole documents: one each, or as many as fit.

    Documents longer than T are cut into pieces of T tokens. A piece gives what it gives alone (see StreamRows); the
    rest of its row is padding: segment 0, weight 0, token 0.

    Args:
      split: the text.
      length: T.
      bins: False: a row per piece. True: pieces are packed best-fit-decreasing, once for all epochs.
    """

    def __init__(self, split: Split, length: int, bins: bool = False):
        self.split, self.length = split, length
        starts = np.asarray(split.starts, np.int64)
        sizes = np.diff(np.append(starts, split.num_tokens + starts[0]))  # the last may go round the circle
        pieces = -(-sizes // length)
        document = np.repeat(np.arange(len(starts)), pieces)
        rank = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._starts = starts[document] + rank * length
        self._sizes = np.minimum(length, sizes[document] - rank * length)
        if bins:
            self._order, self._bounds = best_fit(self._sizes, length)
        else:
            self._order, self._bounds = np.arange(len(document)), np.arange(len(document) + 1)
        self.rows_per_epoch = len(self._bounds) - 1
        self.arrays = text_arrays(length, segments=True)

    def build(self, epochs: np.ndarray, indices: np.ndarray) -> Rows:
        n, length = len(indices), self.length
        out = {k: np.zeros((n, length), np.int32) for k in ("tokens", "targets", "segment_ids", "positions")}
        out["target_weights"] = np.zeros((n, length), np.float32)
        for row, i in enumerate(indices.tolist()):
            at = 0
            for segment, piece in enumerate(self._order[self._bounds[i] : self._bounds[i + 1]].tolist(), 1):
                start, size = int(self._starts[piece]), int(self._sizes[piece])
                part, both = slice(at, at + size), self.split.read(start, size + 1)
                out["tokens"][row, part], out["targets"][row, part] = both[:-1], both[1:]
                out["segment_ids"][row, part] = segment
                out["positions"][row, part] = np.arange(size)
                out["target_weights"][row, part] = 1
                if self.split.eot is None and self.split.begins(start + size, 1)[0]:
                    out["target_weights"][row, at + size - 1] = 0
                at += size
        return out


class ChangedRows:
    """Rows of a stream of text that a function changes one by one, each under a generator of its own.

    Args:
      split: the text. length: T, of a row after the change. change: how. seed: of offsets and generators; None: the
        same rows every time, from the stream's beginning.
    """

    def __init__(self, split: Split, length: int, change: TextRows, seed: int | None = None):
        self.length, self._change, self._seed = length, change, seed
        self._stream = StreamRows(split, change.raw_length, seed=seed)
        self.rows_per_epoch = self._stream.rows_per_epoch
        self.arrays = {name: ((length,), kind) for name, kind in change.arrays.items()}

    def build(self, epochs: np.ndarray, indices: np.ndarray) -> Rows:
        tokens = self._stream.build(epochs, indices)["tokens"]
        out = {name: np.zeros((len(indices), *shape), kind) for name, (shape, kind) in self.arrays.items()}
        for row, (epoch, i) in enumerate(zip(epochs.tolist(), indices.tolist(), strict=True)):
            generator = np.random.Generator(np.random.Philox(mix(self._seed or 0, epoch, i, 6)))
            for name, values in self._change.make(tokens[row], generator).items():
                out[name][row] = values
        return out


def best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs items into bins, largest first, each into the fullest bin that has room (best fit decreasing).

    Args:
      sizes: in [1, capacity], [n].
      capacity: of a bin.

    Returns:
      (order [n], bounds [bins + 1]): bin b holds items order[bounds[b]:bounds[b + 1]].
    """
    free: list[list[int]] = [[] for _ in range(capacity + 1)]  # free[r]: bins with room r
    nonempty = 0  # bit r is set if free[r] is not empty
    bins: list[list[int]] = []
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        fits = nonempty >> size
        if fits:
            room = size + (fits & -fits).bit_length() - 1
            chosen = free[room].pop()
            if not free[room]:
                nonempty &= ~(1 << room)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        if room > size:
            free[room - size].append(chosen)
            nonempty |= 1 << (room - size)
    order = np.array([item for items in bins for item in items], np.int64)
    return order, np.cumsum([0, *map(len, bins)])


def arrays_of(length: int, layout: str, doc_mask: bool, change: TextRows | None = None) -> Arrays:
    """What the rows of `make_rows` hold."""
    if change is not None:
        return {name: ((length,), kind) for name, kind in change.arrays.items()}
    return text_arrays(length, segments=doc_mask or layout != "packed")


def make_rows(
    split: Split, length: int, layout: str, doc_mask: bool, seed: int | None, change: TextRows | None = None
) -> RowMaker:
    """Returns the rows of a text in the layout that a config names (packed, padded or bins), or changed by `change`."""
    if change is not None:
        return ChangedRows(split, length, change, seed)
    if layout == "packed":
        return StreamRows(split, length, doc_mask, seed)
    return PieceRows(split, length, bins=layout == "bins")
