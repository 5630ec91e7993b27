"""How an objective wants its rows: plain text, text changed row by row, or the examples of tasks. Host side, no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Row = dict[str, np.ndarray]
Arrays = Mapping[str, tuple[tuple[int, ...], Any]]  # name -> (shape of a row, dtype)


@dataclasses.dataclass(frozen=True)
class TextRows:
    """Rows of a stream of text, each changed in its length (span corruption).

    Attributes:
      raw_length: tokens of the stream that a row is made of.
      arrays: name -> dtype of what a row holds; each is [context_length].
      make: (tokens [raw_length] int32, generator) -> the row. The generator depends on (seed, epoch, row) alone, so
        that any row can be made at any time.
    """

    raw_length: int
    arrays: Mapping[str, Any]
    make: Callable[[np.ndarray, np.random.Generator], Row]


class ExampleRows(Protocol):
    """Rows of a task's examples.

    Attributes:
      kind: of the tasks it takes ('classify', 'text_to_text', ...).
      arrays: what a row holds.
      pack: whether several examples, each a sequence of tokens, share a row. Their arrays are then [n], n at most the
        row's length, and 'segment_ids' and 'positions' are added; else a row is one piece, its arrays padded with 0.
      generates: whether predictions are generated text. Then there are `prompt(example, tokenizer)` -> ids, `max_new`
        (tokens at most) and `bidirectional` (tokens of the prompt see each other), and no `predictions`.
      check: optional: takes the training examples of all tasks together; raises UserError where they are not of use.
    """

    kind: str
    arrays: Arrays
    pack: bool
    generates: bool

    def encode(self, example: Any, task: TaskInfo, tokenizer: Any) -> Sequence[Row]:
        """Returns the pieces of an example, usually one (windows of a long document: several)."""

    def predictions(self, outputs: Mapping[str, np.ndarray], encoded: Any) -> list[Any]:
        """Turns what `Objective.predict` gave for every row into a prediction per example, as `task.score` takes it.

        Args:
          outputs: name -> [rows, ...]. encoded: the EncodedTask whose rows they are.
        """


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """What an objective may know of a task: its number among those that share the rows, its name and labels.

    Attributes:
      first_label: number of its first label where the labels of all the tasks are counted through.
    """

    number: int
    name: str
    labels: tuple[str, ...] = ()
    first_label: int = 0


@dataclasses.dataclass(frozen=True)
class Part:
    """A sub-batch of a mixture: how its rows are made, of which data, and how many there are in a global batch.

    Attributes:
      rows: None (plain text), TextRows or ExampleRows. data: keys laid over the run's data config. batch_size: rows.
    """

    rows: Any
    data: Mapping[str, Any]
    batch_size: int
