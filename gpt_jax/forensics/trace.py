"""Walks through a traced function operation by operation and names the first that made a number that is not finite.

Every equation of the jaxpr is evaluated on its own, on the arrays of the real step (sharded ones too), and each value
that is not finite remembers where it came from. So what is masked away later (a -inf under a softmax) is not blamed:
only what reached the outputs is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "checkpoint",
    "remat2",
    "remat",
    "custom_jvp_call",
    "custom_vjp_call",
}


@dataclasses.dataclass(frozen=True)
class Culprit:
    """The first tensor that was not finite, among those that reached an output.

    Attributes:
      order: of its operation among all. what: "operation" or "input". phase: prepare | forward | backward | optimizer |
        input. layer: of the model, or None. module: path inside the layer or the model, e.g. "attention" or
        "final_norm"; "loss" outside the model; of an input its name. operation, shape, dtype: of the tensor.
      kind: "nan", "inf" or both. rows: of the batch; tokens: of its rows; () where the tensor has no such axis.
      constant: it came in as a constant of the program (a mask's -inf): blamed only where nothing else is to blame.
    """

    order: int
    what: str
    phase: str
    layer: int | None
    module: str
    operation: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    rows: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    constant: bool = False

    def sentence(self) -> str:
        """The culprit in words."""
        where = self.module if self.layer is None else f"layer {self.layer}, {self.module}"
        of = f" of rows {_few(self.rows)}" if self.rows else ""
        of += f", tokens {_few(self.tokens)}" if self.tokens else ""
        if self.what == "input":
            return f"{self.kind} in {where}, which the step was given{of}"
        return f"{self.kind} first in {where} ({self.phase}): {self.operation} {self.dtype}{list(self.shape)}{of}"


@dataclasses.dataclass
class _Walk:
    period: int
    order: int = 0
    culprits: list[Culprit] = dataclasses.field(default_factory=list)
    sizes: tuple[int, int] = (0, 0)  # rows, tokens

    def first(self, origins: Sequence[int | None]) -> int | None:
        """The origin to blame among several."""
        known = [origin for origin in origins if origin is not None]
        return min(known, key=lambda o: (self.culprits[o].constant, self.culprits[o].order), default=None)


def first_bad(
    closed: Any, arguments: Sequence[Any], names: Sequence[str], *, rows: int = 0, tokens: int = 0, period: int = 1
) -> Culprit | None:
    """Evaluates a closed jaxpr on its flat arguments and returns what first spoilt an output; None if all are finite.

    Args:
      names: of the arguments. rows, tokens: B and T of the batch, by which axes are recognised. period: blocks of the
        model's repeating pattern, by which layers are counted.
    """
    walk = _Walk(period, sizes=(rows, tokens))
    origins = []
    for value, name in zip(arguments, names, strict=True):
        origins.append(None)
        if (kind := _kind(value)) is not None:
            walk.culprits.append(_culprit(walk, value, kind, "input", "input", None, name, "input"))
            origins[-1] = len(walk.culprits) - 1
    consts = [(value, None) for value in closed.consts]
    results = _evaluate(closed.jaxpr, consts, list(zip(arguments, origins, strict=True)), "", None, walk)
    blamed = walk.first([origin for _, origin in results])
    return None if blamed is None else walk.culprits[blamed]


def _evaluate(jaxpr: Any, consts: list, arguments: list, prefix: str, repetition: int | None, walk: _Walk) -> list:
    """Evaluates a jaxpr on (value, origin) pairs."""
    env: dict[Any, tuple[Any, int | None]] = {}

    def read(atom: Any) -> tuple[Any, int | None]:
        if hasattr(atom, "val"):
            return atom.val, None
        return env[atom]

    for variables, pairs in ((jaxpr.constvars, consts), (jaxpr.invars, arguments)):
        env.update(zip(variables, pairs, strict=True))
    last = _last_uses(jaxpr)
    for number, eqn in enumerate(jaxpr.eqns):
        inputs = [read(atom) for atom in eqn.invars]
        stack = str(eqn.source_info.name_stack)
        name = f"{prefix}/{stack}" if prefix and stack else prefix or stack
        outputs = _one(eqn, inputs, name, repetition, walk)
        env.update(zip(eqn.outvars, outputs, strict=True))
        for variable in last.get(number, ()):  # a step's activations need not all stay
            env.pop(variable, None)
    return [read(atom) for atom in jaxpr.outvars]


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    kept = {v for v in jaxpr.outvars if not hasattr(v, "val")}
    last: dict[Any, int] = {}
    for number, eqn in enumerate(jaxpr.eqns):
        for v in (*eqn.invars, *eqn.outvars):
            if not hasattr(v, "val"):
                last[v] = number
    out: dict[int, list[Any]] = {}
    for variable, number in last.items():
        if variable not in kept:
            out.setdefault(number, []).append(variable)
    return out


def _one(eqn: Any, inputs: list, name: str, repetition: int | None, walk: _Walk) -> list:
    primitive = eqn.primitive.name
    if primitive in _CALLS:
        inner = next(eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params)
        jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "jaxpr") else (inner, [])
        return _evaluate(jaxpr, [(c, None) for c in consts], inputs, name, repetition, walk)
    if primitive == "scan":
        return _scan(eqn, inputs, name, walk)
    if primitive == "cond":
        branch = eqn.params["branches"][int(np.clip(int(inputs[0][0]), 0, len(eqn.params["branches"]) - 1))]
        consts = [(c, None) for c in branch.consts]
        return _evaluate(branch.jaxpr, consts, inputs[1:], name, repetition, walk)
    parameters = eqn.primitive.get_bind_params(eqn.params)
    functions, parameters = parameters if isinstance(parameters, tuple) else ((), parameters)  # other versions of jax

    def run(*values: Any) -> Any:
        with eqn.ctx.manager:
            return eqn.primitive.bind(*functions, *values, **parameters)

    # What devices do by themselves is made for a mesh that exists only inside a compiled program.
    result = (jax.jit(run) if primitive == "shard_map" else run)(*(value for value, _ in inputs))
    results = list(result) if eqn.primitive.multiple_results else [result]
    walk.order += 1
    before = walk.first([origin for _, origin in inputs])
    constant = any(origin is None and _kind(value) is not None for value, origin in inputs) or not inputs
    out = []
    for value in results:
        kind, origin = _kind(value), None
        if kind is not None:
            origin = before
            if origin is None:
                phase, layer, module = locate(name, repetition, walk.period)
                operation = _operation(primitive, module, value)
                walk.culprits.append(_culprit(walk, value, kind, "operation", phase, layer, module, operation))
                walk.culprits[-1] = dataclasses.replace(walk.culprits[-1], constant=constant)
                origin = len(walk.culprits) - 1
        out.append((value, origin))
    return out


def _scan(eqn: Any, inputs: list, name: str, walk: _Walk) -> list:
    """A loop, turn by turn: over layers, or over micro-batches."""
    p = eqn.params
    n_consts, n_carry = p["num_consts"], p["num_carry"]
    consts, carry, xs = inputs[:n_consts], inputs[n_consts : n_consts + n_carry], inputs[n_consts + n_carry :]
    body, turns = p["jaxpr"], range(p["length"])
    stacked: list[list] = [[] for _ in eqn.outvars[n_carry:]]
    for turn in reversed(turns) if p["reverse"] else turns:
        own = [(value[turn], origin) for value, origin in xs]
        own = [(value, origin if _kind(value) is not None else None) for value, origin in own]
        body_consts = [(c, None) for c in body.consts]
        out = _evaluate(body.jaxpr, body_consts, [*consts, *carry, *own], name, turn, walk)
        carry = out[:n_carry]
        for place, pair in zip(stacked, out[n_carry:], strict=True):
            place.append(pair)
    ys = []
    for place in stacked:
        pairs = place[::-1] if p["reverse"] else place
        ys.append((jnp.stack([value for value, _ in pairs]), walk.first([origin for _, origin in pairs])))
    return [*carry, *ys]


def _kind(value: Any) -> str | None:
    """None if all of a value is finite, else which kinds it holds."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return None if not isinstance(value, float) or np.isfinite(value) else "inf" if value == value else "nan"
    if not jnp.issubdtype(dtype, jnp.inexact) or bool(jnp.isfinite(value).all()):
        return None
    nan, inf = bool(jnp.isnan(value).any()), bool(jnp.isinf(value).any())
    return "nan and inf" if nan and inf else "nan" if nan else "inf"


def locate(name: str, repetition: int | None, period: int = 1) -> tuple[str, int | None, str]:
    """(phase, layer, module) of a name stack such as 'transpose(jvp(Transformer.encode))/.../layers/block_0/mlp/up'."""
    phase = "backward" if "transpose(" in name else "forward" if "jvp(" in name else "prepare"
    for scope in ("optimizer", "prepare", "weigh"):
        if re.search(rf"(^|[/(]){scope}([/)]|$)", name):
            phase = scope
    parts = [
        part
        for part in re.sub(r"\b(?:transpose|jvp|vmap|checkpoint|rematted_computation)\b|[()]", "/", name).split("/")
        if part
    ]
    layer = None
    for number, part in enumerate(parts):
        if (found := re.fullmatch(r"block_(\d+)", part)) is not None:
            layer = (repetition or 0) * period + int(found[1])
            parts = parts[number + 1 :]
            break
    inside = [part for part in parts if "." not in part and part not in ("layers", "optimizer", "prepare", "weigh")]
    if inside:
        module = "/".join(dict.fromkeys(inside))
    elif layer is not None:
        module = "residual stream"
    else:
        method = next((part.rpartition(".")[2] for part in reversed(parts) if "." in part), "")
        names = {"encode": "embedding", "_encode": "embedding", "unembed": "output layer"}
        module = names.get(method, method) or ("loss" if phase in ("forward", "backward") else phase)
    return phase, layer, module


def _operation(primitive: str, module: str, value: Any) -> str:
    if primitive == "shard_map":
        return "what each device does by itself (shard_map)"
    if module == "attention" and primitive == "dot_general" and value.ndim == 5 and value.shape[-1] != 1:
        return "attention scores or outputs (dot_general)"
    return primitive


def _culprit(
    walk: _Walk, value: Any, kind: str, what: str, phase: str, layer: int | None, module: str, operation: str
) -> Culprit:
    value = np.asarray(jax.device_get(value))
    rows, tokens = places(~np.isfinite(value), *walk.sizes) if phase != "optimizer" else ((), ())
    if what == "input" and not module.startswith("batch"):
        rows = tokens = ()
    order = walk.order if what == "operation" else -1
    return Culprit(order, what, phase, layer, module, operation, value.shape, str(value.dtype), kind, rows, tokens)


def places(bad: np.ndarray, rows: int, tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which rows and tokens of a batch a mask over the entries of a tensor touches; () where it has no such axis."""
    if not rows or not bad.ndim:
        return (), ()
    if tokens and bad.shape[0] == rows * tokens and bad.shape[0] != rows:
        bad = bad.reshape(rows, tokens, -1)
    if bad.shape[0] != rows:
        return (), ()
    found = tuple(np.flatnonzero(bad.reshape(rows, -1).any(1)).tolist())
    axis = 1 if bad.ndim > 1 and bad.shape[1] == tokens else 3 if bad.ndim == 5 and bad.shape[3] == tokens else None
    if axis is None or not tokens:
        return found, ()
    return found, tuple(np.flatnonzero(np.moveaxis(bad, axis, 0).reshape(tokens, -1).any(1)).tolist())


def _few(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown}, ... ({len(numbers)} in all)"


def trace_update(step: Any, state: Any, batch: Any, *, rows: int, tokens: int, period: int) -> Culprit | None:
    """Names the first bad tensor of an update: see `first_bad`. Works on the step's own mesh.

    Args:
      step: a TrainStep with one micro-batch. state, batch: on its mesh; both stay as they are.
    """
    from gpt_jax.sharding import path_name

    with step.context():
        traced = step.jitted.trace(step.abstract, step.batch_spec)
        leaves = jax.tree_util.tree_leaves_with_path((state, batch))
        names = [_input_name(path_name(path)) for path, _ in leaves]
        arguments = [leaf for _, leaf in leaves]
        return first_bad(traced.jaxpr, arguments, names, rows=rows, tokens=tokens, period=period)


def _input_name(name: str) -> str:
    """'0/opt_state/1/0/mu/model/...' -> 'opt_state/1/0/mu/model/...', '1/target_weights' -> 'batch/target_weights'."""
    which, _, rest = name.partition("/")
    return rest if which == "0" else f"batch/{rest}"


__all__: list[str] = ["Culprit", "first_bad", "locate", "places", "trace_update"]
