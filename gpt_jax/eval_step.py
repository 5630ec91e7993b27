"""Evaluation and prediction: the forward passes that belong to a train step, compiled for its mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from gpt_jax.objectives.base import Objective
from gpt_jax.sharding import batch_shardings
from gpt_jax.step import TrainStep, row_keys

EVALUATION = 0x7FFFFFFF  # stands where the step does in the row keys of an evaluation


def build_eval_step(
    step: TrainStep, batch_spec: Any, *, seed: int = 0, objective: Objective | None = None
) -> Callable[[Any, Any, int], dict[str, Any]]:
    """Builds the evaluation of the same objective: prepare and loss, without scores, dropout or update.

    Args:
      step: the train step it belongs to. batch_spec: of a validation batch.
      seed: of whatever the objective draws, folded with the example's index: the same masks every time.
      objective: a part of the step's that has a batch of its own; None is the step's.

    Returns:
      evaluate(params, batch, first) -> {name: (sum, weight)}, float32 scalars on the device, where `first` is the
      index of the batch's first example. Sum them over batches (`add_sums`), then divide.
    """
    objective = objective or step.objective

    def evaluate(params: Any, batch: Any, first: Array) -> dict[str, tuple[Array, Array]]:
        keys = row_keys(seed, EVALUATION, first + jnp.arange(objective.num_rows(batch)))
        batch = objective.prepare(batch, keys, jnp.zeros((), jnp.int32))
        sums, metrics = objective.loss(params, batch, keys, False)
        totals = {term: jnp.sum(weight, dtype=jnp.float32) for term, weight in objective.weights(batch).items()}
        for term in objective.batch_terms:
            totals[term] = jnp.ones(())
        out = {f"loss/{term}": (value, totals[term]) for term, value in sums.items()}
        return out | dict(metrics)

    replicated = NamedSharding(step.mesh, PartitionSpec())
    placed = (step.param_shardings, batch_shardings(batch_spec, step.mesh), None)
    jitted = jax.jit(evaluate, in_shardings=placed, out_shardings=replicated)

    def run(params: Any, batch: Any, first: int) -> dict[str, Any]:
        with step.context():
            return jitted(params, batch, jnp.asarray(first, jnp.int32))

    return run


def build_predict_step(step: TrainStep, batch_spec: Any, objective: Objective) -> Callable[[Any, Any], dict[str, Any]]:
    """Builds (params, batch) -> {name: [rows, ...]}, replicated: the objective's `predict`."""
    placed = (step.param_shardings, batch_shardings(batch_spec, step.mesh))
    jitted = jax.jit(objective.predict, in_shardings=placed, out_shardings=NamedSharding(step.mesh, PartitionSpec()))

    def run(params: Any, batch: Any) -> dict[str, Any]:
        with step.context():
            return jitted(params, batch)

    return run
