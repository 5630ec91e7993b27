"""FLOPs: of a train step by its parameters, and of a traced program.

Of a program loops are counted as often as they run (XLA's own analysis counts a loop's body once).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from gpt_jax.model.config import ModelConfig
from gpt_jax.sharding import path_name
from gpt_jax.train_state import TrainState


def step_flops_per_token(state: TrainState, model: ModelConfig, context_length: int) -> float:
    """Returns what a token of a train step costs in all its networks, recomputation excluded.

    A trained parameter counts 6 (2 forward, 4 backward), a frozen one 4 where gradients pass through its network to
    others (LoRA's base) and 2 in a network that only runs forward (a teacher, a reference); attention 12 L D T, or
    4 L D T forward only. Of one network that is trained whole: 6 N + 12 L D T (PaLM, arXiv:2204.02311, appendix B).

    Args:
      state: shapes of the parameters. model: of the root `model`. context_length: T; attention has no causal half.
    """
    leaves = [(k, path_name(path), leaf) for k, part in enumerate((state.params, state.frozen))
              for path, leaf in jax.tree_util.tree_leaves_with_path(part)]  # fmt: skip
    trained = {name.split("/")[0] for frozen, name, _ in leaves if not frozen}
    total, widths = 0.0, {"model": model.num_layers * model.d_model}  # L D by network
    for frozen, name, leaf in leaves:
        root = name.split("/")[0]
        total += parameters_in(name, leaf.shape, model) * (6 if not frozen else 4 if root in trained else 2)
        if root != "model" and re.search(r"/layers/.*/attention/(qkv|q)/kernel$", name):
            widths[root] = widths.get(root, 0) + leaf.shape[0] * leaf.shape[1]
    return total + sum((12 if root in trained else 4) * size * context_length for root, size in widths.items())


def parameters_in(name: str, shape: Sequence[int], model: ModelConfig) -> int:
    """Returns the parameters of an array of this name, rows that pad a vocabulary excluded."""
    padded = name.rsplit("/", 1)[-1] in ("embedding", "head") and shape[0] == model.padded_vocab
    return math.prod((model.vocab_size, *shape[1:]) if padded else shape)


def count_flops(jaxpr: Any, trips: int = 1) -> float:
    """Returns the FLOPs of all matrix products of a jaxpr, over all devices; elementwise work is not counted.

    A product of [.., M, K] and [.., K, N] is 2 M N K. A scan counts its length times, recomputation (remat) like any
    other work, the larger branch of a cond, a shard_map for every device, a Pallas kernel what it says it costs.

    Args:
      jaxpr: a ClosedJaxpr or Jaxpr. trips: how often a while loop whose length is not known runs.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _product(equation)
        elif name == "scan":
            total += params["length"] * count_flops(params["jaxpr"], trips)
        elif name == "while":
            total += trips * (count_flops(params["body_jaxpr"], trips) + count_flops(params["cond_jaxpr"], trips))
        elif name == "cond":
            total += max(count_flops(branch, trips) for branch in params["branches"])
        elif name == "shard_map":
            total += params["mesh"].size * count_flops(params["jaxpr"], trips)
        elif name == "pallas_call":
            total += _kernel(params, trips)
        else:
            total += sum(count_flops(inner, trips) for inner in _jaxprs(params))
    return total


def _product(equation: Any) -> float:
    (contract, _), _ = equation.params["dimension_numbers"]
    inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contract)
    return 2.0 * inner * math.prod(equation.outvars[0].aval.shape)


def _kernel(params: dict[str, Any], trips: int) -> float:
    cost = params.get("cost_estimate")
    if cost is not None and cost.flops:
        return float(cost.flops)
    grid = math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int))
    return grid * count_flops(params["jaxpr"], trips)


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)):
                yield item
