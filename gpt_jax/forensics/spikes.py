"""What a step looked like: which rows it read, the loss of each, the norms of weights and gradients by layer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gpt_jax.data.loader import global_batch
from gpt_jax.data.permutation import mix, permute
from gpt_jax.files import atomic_write
from gpt_jax.metrics import MetricsWriter
from gpt_jax.sharding import path_name
from gpt_jax.step import prepared, ratio, total_loss
from gpt_jax.workdir import Workdir

FOLDER = "spikes"


def build_examine(step: Any, seed: int) -> Callable[[Any, Any, Any], dict[str, Any]]:
    """Builds (params, batch, step number) -> what a step on this batch looks like.

    Args:
      step: the TrainStep. seed: of the run: masks and dropout are those of the step.

    Returns:
      A function whose result has "loss"; "rows": {term's weights: mean loss of each row [B]} (0 where a row has no
      weight); "gradient_norms" and "weight_norms": {parameter: [layers] or a number}.
    """
    objective = step.objective

    def examine(params: Any, batch: Any, number: Any) -> dict[str, Any]:
        batch, keys, totals = prepared(objective, params, batch, step=number, seed=seed)
        with_path = jax.tree_util.tree_map_with_path

        def is_weight(path: Any) -> bool:
            return "weights" in path_name(path).split("/")

        ones = with_path(lambda p, x: jnp.ones(x.shape[0]) if is_weight(p) else None, batch)

        def loss(params: Any, scales: Any) -> tuple[Any, Any]:
            # Sums are linear in the weights: the slope in a row's scale is what that row adds to them.
            scaled = jax.tree.map(
                lambda x, s: x if s is None else x * s.reshape(-1, *(1,) * (x.ndim - 1)),
                batch,
                scales,
                is_leaf=lambda x: x is None,
            )
            sums, _ = objective.loss(params, scaled, keys, True)
            return total_loss(objective, sums, totals, number, 1), sums

        def term_sums(scales: Any) -> Any:
            return loss(params, scales)[1]

        value, gradient = jax.value_and_grad(lambda p: loss(p, ones)[0])(params)
        shares = jax.grad(lambda scales: sum(term_sums(scales).values()))(ones)

        def per_row(path: Any, share: Any, weight: Any) -> Any:
            return None if share is None else ratio(share, jnp.sum(weight.reshape(weight.shape[0], -1), axis=1))

        rows = with_path(per_row, shares, batch, is_leaf=lambda x: x is None)
        named = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(rows)}
        return {
            "loss": value,
            "rows": named,
            "gradient_norms": _norms(gradient),
            "weight_norms": _norms(params),
        }

    compiled = jax.jit(examine, out_shardings=NamedSharding(step.mesh, PartitionSpec()))

    def run(params: Any, batch: Any, number: int) -> dict[str, Any]:
        with step.context():
            return jax.device_get(compiled(params, batch, jnp.asarray(number, jnp.int32)))

    return run


def _norms(tree: Any) -> dict[str, Any]:
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            axes = tuple(range(1, leaf.ndim)) if "layers" in path_name(path).split("/") else None
            out[path_name(path)] = jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes))
    return out


def batch_ids(source: Any, step: int) -> dict[str, Any]:
    """Which rows of the data the batch of a step has; {} if not known.

    Returns:
      {"row": numbers counted over the whole run, "epoch", "index": row of the epoch's data in its own order}; of a
      mixture of objectives by part.
    """
    if hasattr(source, "parts"):
        return {name: batch_ids(part, step) for name, part in source.parts.items()}
    source = getattr(source, "source", source)
    if not hasattr(source, "order"):
        return {}
    numbers = np.asarray(source.order.rows(step, slice(None)))
    if not hasattr(source, "maker"):  # a mixture of texts: rows are numbered before they are dealt to texts
        return {"row": numbers.tolist()}
    epochs, places = np.divmod(numbers, source.rows_per_epoch)
    index = [
        int(permute(np.array([place]), source.rows_per_epoch, mix(source.seed, int(epoch), 2))[0])
        for epoch, place in zip(epochs, places, strict=True)
    ]
    return {"row": numbers.tolist(), "epoch": epochs.tolist(), "index": index}


def jsonable(node: Any) -> Any:
    """Arrays as lists; what is not finite as text, as in metrics.jsonl."""
    if isinstance(node, Mapping):
        return {str(key): jsonable(value) for key, value in node.items()}
    if hasattr(node, "tolist"):
        node = node.tolist()
    if isinstance(node, list | tuple):
        return [jsonable(value) for value in node]
    if isinstance(node, float) and not math.isfinite(node):
        return "nan" if math.isnan(node) else "inf" if node > 0 else "-inf"
    return node


@dataclasses.dataclass
class Watch:
    """Keeps what a step looked like whose loss or gradient norm trips its z-score, or is not finite.

    The step's own weights are gone by then: they are donated to the update. So its batch is looked at with the weights
    at hand, a step or two later; `gpt-jax replay` gives the step itself.

    Attributes:
      threshold: of the z-scores; 0 is off. most: spikes kept of a run, the first ones.
    """

    workdir: Workdir
    source: Any
    step: Any
    seed: int
    writer: MetricsWriter
    threshold: float
    most: int = 5
    count: int = 0
    examine: Callable[[Any, Any, int], dict[str, Any]] | None = None

    def why(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Why a step trips: {"loss": z, "grad_norm": z}, "not finite" for z; {} if it does not.

        A step that wrote no row (log.every_steps) has no z.
        """
        out: dict[str, Any] = {}
        for name in ("loss", "grad_norm") if self.threshold and self.count < self.most else ():
            score = self.writer.zscore(f"train/{name}") if self.writer.last_step == step else None
            if not math.isfinite(float(metrics[name])):
                out[name] = "not finite"
            elif score is not None and score > self.threshold:
                out[name] = round(score, 2)
        return out

    def __call__(self, step: int, metrics: Mapping[str, Any], state: Any) -> None:
        """Saves spikes/step_N.json if step `step` (counted from 1), just logged, trips; `state` is the newest."""
        why = self.why(step, metrics)
        if not why:
            return
        self.count += 1
        try:
            self.examine = self.examine or build_examine(self.step, self.seed)
            batch = global_batch(self.source, step - 1, self.step.batch_shardings)
            found = self.examine(state.all_params, batch, step - 1)
        except Exception as error:  # a look at a spike (no memory for another gradient?) must not end the run
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        ids = batch_ids(self.source, step - 1)
        record = {"step": step, "why": why, "weights_of_step": int(state.step), "ids": ids}
        folder = self.workdir.path / FOLDER
        if self.workdir.writes:
            folder.mkdir(exist_ok=True)
            atomic_write(folder / f"step_{step:08d}.json", json.dumps(jsonable(record | found), indent=1) + "\n")
