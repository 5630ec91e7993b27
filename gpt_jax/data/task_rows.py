"""Tasks to rows: examples encoded once, alone in a row or packed, and drawn like any other rows."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gpt_jax.data.batches import BatchOrder, TrainSource, ValidSource
from gpt_jax.data.formats import Arrays, ExampleRows, Row, TaskInfo
from gpt_jax.data.mixture import MixtureSource
from gpt_jax.data.permutation import mix
from gpt_jax.data.rows import Rows, best_fit
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.errors import UserError, choose
from gpt_jax.tasks import Task, load_task
from gpt_jax.tasks.metrics import require

Log = Callable[[str], None]
RATES = ("proportional", "equal")


class EncodedTask:
    """The rows of one split of a task (a RowMaker), and which example each of them is of.

    Args:
      task: for scores. info: what the objective knows of it. examples: of the split. rows: how they are encoded.
      tokenizer: of the run. length: T, tokens of a row.

    Attributes:
      owners: the example of each piece, ascending [pieces]. Unless pieces are packed, piece i is row i.
    """

    def __init__(
        self,
        task: Task,
        info: TaskInfo,
        examples: Sequence[Any],
        rows: ExampleRows,
        tokenizer: Tokenizer,
        length: int,
    ):
        self.task, self.info, self.examples, self.format, self.tokenizer = task, info, examples, rows, tokenizer
        self.length = length
        encoded = [rows.encode(example, info, tokenizer) for example in examples]
        self.pieces: list[Row] = [piece for pieces in encoded for piece in pieces]
        self.owners = np.repeat(np.arange(len(examples)), [len(pieces) for pieces in encoded])
        if not self.pieces:
            raise UserError(f"no example of task {task.name} fits into rows of {length} tokens.")
        self.arrays = example_arrays(rows, length)
        if rows.pack:
            sizes = np.array([len(next(iter(piece.values()))) for piece in self.pieces])
            self._order, self._bounds = best_fit(sizes, length)
        else:
            self._order, self._bounds = np.arange(len(self.pieces)), np.arange(len(self.pieces) + 1)
        self.rows_per_epoch = len(self._bounds) - 1

    @property
    def sha256(self) -> str:
        """A checksum of all encoded pieces, in order: of the examples, the template and the tokenizer together."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            for name in sorted(piece):
                values = np.asarray(piece[name])
                digest.update(f"{name}{values.dtype}{values.shape}".encode() + values.tobytes())
        return digest.hexdigest()

    def build(self, epochs: np.ndarray, indices: np.ndarray) -> Rows:
        out = {name: np.zeros((len(indices), *shape), kind) for name, (shape, kind) in self.arrays.items()}
        out["task"][:] = self.info.number
        for row, i in enumerate(indices.tolist()):
            pieces = [self.pieces[p] for p in self._order[self._bounds[i] : self._bounds[i + 1]].tolist()]
            if not self.format.pack:
                for name, values in pieces[0].items():
                    out[name][(row, *map(slice, np.shape(values)))] = values
                continue
            at = 0
            for segment, piece in enumerate(pieces, 1):
                size = len(next(iter(piece.values())))
                for name, values in piece.items():
                    out[name][row, at : at + size] = values
                out["segment_ids"][row, at : at + size] = segment
                out["positions"][row, at : at + size] = np.arange(size)
                at += size
        return out


def example_arrays(rows: ExampleRows, length: int) -> Arrays:
    """What a row of `length` tokens of a task's examples holds."""
    packed = {"segment_ids": ((length,), np.int32), "positions": ((length,), np.int32)} if rows.pack else {}
    return {**rows.arrays, "task": ((), np.int32), **packed}


class ValidTask(ValidSource):
    """Batches that cover a split of a task once; `encoded` has the examples behind them."""

    def __init__(self, encoded: EncodedTask, rows_per_batch: int, part: str = ""):
        super().__init__(encoded, rows_per_batch, part)
        self.encoded = encoded


def load_tasks(specs: Sequence[Any], kind: str, what: str) -> tuple[list[Task], tuple[TaskInfo, ...]]:
    """Returns the tasks that `data.tasks` names, all of one kind, and what objectives may know of them."""
    if not specs:
        raise UserError(f"the objective{what} trains on tasks of kind {kind!r}: name one or more in data.tasks.")
    tasks, infos, first = [], [], 0
    for spec in specs:
        task = load_task(spec)
        if task.kind != kind:
            raise UserError(f"task {task.name} is of kind {task.kind!r}; the objective{what} takes {kind!r}.")
        require(task.metrics)
        if kind in ("classify", "tag") and not task.labels:
            raise UserError(f"task {task.name} declares no labels; the objective{what} has an output for each.")
        tasks.append(task)
        infos.append(TaskInfo(len(infos), task.name, task.labels, first))
        first += len(task.labels)
    names = [info.name for info in infos]
    if len(set(names)) < len(names):
        raise UserError(f"data.tasks names a task twice: {', '.join(names)}.")
    return tasks, tuple(infos)


def mixing_rates(sizes: Sequence[int], rates: str, cap: int, temperature: float) -> list[float]:
    """Returns r ~ min(e, cap)^(1/temperature) of drawn examples, summing to 1 (T5, section 3.5.2), or equal rates.

    Args:
      sizes: examples of each task. cap: T5's artificial limit K. temperature: 1 is proportional.
    """
    choose("data.task_rates", rates, RATES)
    if temperature <= 0 or cap < 1:
        raise UserError(f"data.task_temperature is {temperature} and data.task_cap {cap}; both must be above 0.")
    raw = [1.0 if rates == "equal" else min(size, cap) ** (1.0 / temperature) for size in sizes]
    return [r / sum(raw) for r in raw]


def check_targets(rows: ExampleRows, encoded: Sequence[EncodedTask]) -> None:
    """Raises UserError for training examples that have nothing to learn: none that `rows` wants, or all of weight 0."""
    if check := getattr(rows, "check", None):
        check([example for one in encoded for example in one.examples])
    for one in encoded:
        weights = [piece["target_weights"] for piece in one.pieces if "target_weights" in piece]
        if weights and not any(map(np.any, weights)):
            raise UserError(
                f"no training example of task {one.task.name} has a token to predict in its row of {one.length} tokens."
            )


def task_sources(
    data: Any,
    rows: ExampleRows,
    tokenizer: Tokenizer,
    *,
    length: int,
    order: BatchOrder,
    eval_batch_size: int,
    seed: int,
    part: str,
    log: Log,
) -> tuple[Any, dict[str, ValidTask], tuple[TaskInfo, ...], dict[str, Mapping[str, Any]]]:
    """Returns (training source, validation sources by task, what objectives may know, counts by task and split)."""
    tasks, infos = load_tasks(data.tasks, rows.kind, f" {part!r}" if part else "")
    makers, valid, counts = [], {}, {}
    for task, info in zip(tasks, infos, strict=True):
        wanted = {"train": "train"} | ({data.valid_split: "valid"} if data.valid_split in task.splits else {})
        counts[task.name] = {}
        for split, use in wanted.items():
            encoded = EncodedTask(task, info, task.examples(split), rows, tokenizer, length)
            skipped = task.skipped[split]
            counts[task.name][split] = {"examples": len(encoded.examples), "rows": encoded.rows_per_epoch}
            counts[task.name][split]["sha256"] = encoded.sha256
            counts[task.name][split] |= {"skipped": skipped.count} if skipped.count else {}
            if skipped.count:
                log(f"{task.name}/{split}: {skipped.count} malformed examples left out, such as {skipped.messages[0]}")
            if use == "valid":
                valid[task.name] = ValidTask(encoded, eval_batch_size, part)
            if split == "train":
                makers.append(encoded)
    check_targets(rows, makers)
    if len(makers) == 1:
        train: Any = TrainSource(makers[0], order, seed, tasks[0].name, whole=False)
    else:
        sizes = [len(maker.examples) for maker in makers]
        rates = mixing_rates(sizes, data.task_rates, data.task_cap, data.task_temperature)
        # Rows are drawn, which may hold several examples (packed) or a part of one (windows).
        weights = [r * m.rows_per_epoch / e for r, m, e in zip(rates, makers, sizes, strict=True)]
        seed = mix(seed, zlib.crc32(part.encode()), 7)
        train = MixtureSource(makers, weights, [t.name for t in tasks], order, seed, whole=False)
    return train, valid, infos, counts
