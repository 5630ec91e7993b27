"""Fine-tuning the same start weights again and again, on other examples, with one compiled update."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.data.batches import BatchOrder, TrainSource
from gpt_jax.data.formats import ExampleRows, TaskInfo
from gpt_jax.data.task_rows import EncodedTask
from gpt_jax.optim import make_optimizer, make_schedule
from gpt_jax.sharding import make_mesh
from gpt_jax.step import build_train_step
from gpt_jax.tasks import Task

RATES = {"adamw": 1e-3, "muon": 0.02}  # of each optimizer that a generator may be tuned with


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to fine-tune: steps of `batch_size` rows of `length` tokens, the rate warmed up over 10% and then to 0.

    The optimizer should be that of the pre-training: weights that Muon made hardly move under AdamW.
    """

    steps: int = 100
    batch_size: int = 8
    length: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    optimizer: str = "adamw"


class FineTuner:
    """`fit(examples, seed)` -> parameters. The update is compiled once, whatever the examples.

    Args:
      objective: what is trained. rows: how it wants examples. tokenizer: of the start weights.
      start: parameters by root; roots that it lacks (a head) begin anew, by the seed.
      recipe: see there. labels: of the task, for `rows`.
    """

    def __init__(
        self, objective: Any, rows: ExampleRows, tokenizer: Any, start: Mapping[str, Any], recipe: Recipe, labels: Any
    ):
        self.objective, self.rows, self.tokenizer, self.recipe = objective, rows, tokenizer, recipe
        self.start, self.labels = start, tuple(labels)
        rate = make_schedule(peak=recipe.learning_rate, steps=recipe.steps, warmup="10%", end_factor=0.0)
        optimizer = make_optimizer(recipe.optimizer, rate, weight_decay=recipe.weight_decay)
        spec = objective.batch_spec(recipe.batch_size, recipe.length)
        mesh = make_mesh(devices=jax.devices()[:1])
        self.step = build_train_step(objective, optimizer, spec, mesh=mesh)
        self._fitted: tuple[int, Any] = (-1, None)

    def encode(self, examples: Sequence[Any]) -> EncodedTask:
        """Rows of examples."""
        task = Task("augment", "classify", (), {}, labels=self.labels)
        info = TaskInfo(0, "augment", self.labels)
        return EncodedTask(task, info, list(examples), self.rows, self.tokenizer, self.recipe.length)

    def fit(self, examples: Sequence[Any], seed: int, shares: Sequence[Any] = ()) -> dict[str, Any]:
        """Trains on examples from the start weights.

        Args:
          examples: originals. seed: of new heads and of the order. shares: synthetic ones; if there are any, half of
            each batch is of them, so that every arm of a comparison takes the same steps of the same size.

        Returns:
          Parameters by root.
        """
        recipe = self.recipe
        fresh = self.step.init(seed)
        roots = {root: self.start.get(root, tree) for root, tree in fresh.all_params.items()}
        # Placed as the step wants them; copied, since the state is donated.
        placed = jax.tree.map(jax.device_put, roots, self.step.param_shardings)
        state = self.step.with_params(fresh, jax.tree.map(jnp.copy, placed))
        counts = [recipe.batch_size]
        groups = [examples]
        if shares:
            counts, groups = [recipe.batch_size - recipe.batch_size // 2, recipe.batch_size // 2], [examples, shares]
        sources = [
            TrainSource(self.encode(group), BatchOrder(count), seed + k, whole=False)
            for k, (group, count) in enumerate(zip(groups, counts, strict=True))
        ]
        for number in range(recipe.steps):
            parts = [source.rows(number, slice(None)) for source in sources]
            batch = {name: np.concatenate([part[name] for part in parts]) for name in self.step.batch_spec}
            state, _ = self.step(state, self.step.put(batch))
        return state.eval_params("raw")

    def fitted(self, examples: Sequence[Any]) -> dict[str, Any]:
        """What `fit` gives, under the examples' hash as the seed: trained anew only if they are others than before."""
        seed = zlib.crc32(repr([(e.label, e.text) for e in examples]).encode()) & 0x7FFFFFFF
        if self._fitted[0] != seed:
            self._fitted = (seed, self.fit(examples, seed))
        return self._fitted[1]
