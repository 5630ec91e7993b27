"""A trained classifier as a function of texts: for rewards, filters and scores of generated text."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gpt_jax.data.formats import TaskInfo
from gpt_jax.errors import UserError
from gpt_jax.generation import bucket
from gpt_jax.loading import load
from gpt_jax.objectives.base import Host, Setting, build_objective, rows_of
from gpt_jax.tasks import Classify, load_task

_ROWS = 64  # texts at a time


@dataclasses.dataclass(frozen=True)
class TextClassifier:
    """`probabilities(texts)` -> [N, labels] float32, in the order of `labels`."""

    labels: tuple[str, ...]
    predict: Callable[[dict[str, np.ndarray]], Any]
    rows: Any
    tokenizer: Any

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the probability of each label for each text, [N, labels]."""
        info = TaskInfo(0, "texts", self.labels)
        out = []
        for start in range(0, len(texts), _ROWS):
            some = texts[start : start + _ROWS]
            pieces = [self.rows.encode(Classify(t, self.labels[0]), info, self.tokenizer)[0] for t in some]
            batch = {
                name: np.zeros((bucket(len(some)), *shape), kind) for name, (shape, kind) in self.rows.arrays.items()
            }
            batch["task"] = np.zeros(bucket(len(some)), np.int32)
            for i, piece in enumerate(pieces):
                for name, values in piece.items():
                    batch[name][(i, *map(slice, np.shape(values)))] = values
            out.append(np.exp(np.asarray(self.predict(batch)["log_probs"], np.float32))[: len(some)])
        return np.concatenate(out) if out else np.zeros((0, len(self.labels)), np.float32)


def load_classifier(workdir: str | os.PathLike) -> TextClassifier:
    """Opens a run with the objective `classify` on one task.

    Raises:
      UserError: no run there, or one with another objective or several tasks; the task has more or fewer labels now.
    """
    run = load(workdir)
    config = run.config
    if config.objective["name"] != "classify" or len(config.data.tasks) != 1:
        raise UserError(
            f"{str(workdir)!r} is no classifier: its objective is {config.objective['name']!r}, not classify."
        )
    labels = load_task(config.data.tasks[0]).labels
    outputs = np.shape(run.all_params["classifier"]["bias"])[-1]
    if len(labels) != outputs:  # they may be those of a file, which can have changed
        raise UserError(
            f"the classifier in {str(workdir)!r} has {outputs} outputs, but its task has {len(labels)} labels now "
            f"({', '.join(labels)}): give the task those that it was trained with, or train it again."
        )
    setting = Setting(
        model=config.model,
        specials=run.tokenizer.specials,
        context_length=config.context_length,
        tasks=(TaskInfo(0, "texts", labels),),
    )
    objective = build_objective(config.objective, setting)
    rows = rows_of(config.objective, Host(run.tokenizer.specials, config.context_length, 1))
    predict = jax.jit(objective.predict)
    return TextClassifier(labels, lambda batch: predict(run.all_params, batch), rows, run.tokenizer)
