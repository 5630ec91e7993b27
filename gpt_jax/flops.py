"""FLOPs of a traced program, loops counted as often as they run (XLA's own analysis counts a loop's body once)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax


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
