"""One mesh, rules from logical axes to mesh axes, and the shardings of parameters, optimizer state and batches.

The model names the logical axes of every parameter; nothing in it knows a device. Meshes use Auto axes with shardings
pinned at the jit's boundary (Linen's logical partitioning does not run under Explicit ones).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt_jax.errors import UserError, choose

AXES = ("data", "fsdp", "tensor", "sequence")

Rules = Sequence[tuple[str, Any]]

# (logical axis, mesh axis): the first rule whose mesh axes are free and divide the dimension is taken.
DEFAULT_RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("sequence", "sequence"),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("kv_heads", None),
    ("mlp", "tensor"),
    ("act_embed", None),
    ("head_dim", None),
    ("positions", None),
    ("norm", None),
    ("layers", None),
)


def make_mesh(
    sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None, **named: int
) -> Mesh:
    """Returns the mesh (data, fsdp, tensor, sequence); a size of -1 is what is left (default: fsdp).

    Raises:
      UserError: sizes whose product is not the number of devices, or two of -1.
    """
    devices = list(devices if devices is not None else jax.devices())
    given = {**dict.fromkeys(AXES, 1), "fsdp": -1, **(sizes or {}), **named}
    for axis in given:
        choose("a mesh axis", axis, AXES)
    shape = [given[axis] for axis in AXES]
    if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
        raise UserError(f"mesh is {dict(zip(AXES, shape, strict=True))}: sizes are positive, and one may be -1.")
    fixed = math.prod(n for n in shape if n != -1)
    if -1 in shape and len(devices) % fixed == 0:
        shape[shape.index(-1)] = len(devices) // fixed
    if math.prod(shape) != len(devices):
        raise UserError(
            f"mesh is {dict(zip(AXES, shape, strict=True))}, which does not make up the {len(devices)} devices here."
        )
    grid = np.asarray(devices).reshape(shape)
    if devices[0].platform in ("tpu", "gpu") and len(devices) > 1:
        from jax.experimental import mesh_utils

        grid = mesh_utils.create_device_mesh(shape, devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_for(logical: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules, name: str) -> PartitionSpec:
    """Returns the PartitionSpec of an array with logical axes; raises UserError naming it if no rule's axis divides."""
    used: set[str] = set()
    entries: list[Any] = []
    for axis, size in zip(logical, shape, strict=True):
        entry, tried = None, []
        for rule_axis, target in rules:
            if rule_axis != axis:
                continue
            if target is None:
                break
            targets = (target,) if isinstance(target, str) else tuple(target)
            ways = math.prod(mesh.shape[t] for t in targets)
            if ways == 1 or used & set(targets):
                continue
            if size % ways == 0:
                entry = target
                used |= set(targets)
                break
            tried.append(f"{'x'.join(targets)}={ways}")
        else:
            if tried:
                raise UserError(
                    f"parameter {name!r} has size {size} along {axis!r}, which {' or '.join(tried)} does not divide; "
                    f"choose another mesh or add a rule ('{axis}', None) to mesh.rules."
                )
        entries.append(entry)
    return PartitionSpec(*entries)


def path_name(path: Sequence[Any]) -> str:
    """Returns 'model/layers/...' for a key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.Partitioned)


def unbox(boxed: Any) -> Any:
    """Returns the plain parameters of a boxed tree; where they lie is `param_shardings`' to say, not the boxes'."""
    return jax.tree.map(lambda leaf: leaf.value if is_boxed(leaf) else leaf, boxed, is_leaf=is_boxed)


def param_shardings(boxed: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Returns the NamedSharding of each parameter of a (abstract) boxed tree, as a tree of plain leaves."""

    def one(path, leaf):
        name = path_name(path)
        if not is_boxed(leaf):
            raise UserError(f"parameter {name!r} names no logical axes; make it with nn.with_logical_partitioning.")
        return NamedSharding(mesh, spec_for(leaf.names, leaf.value.shape, mesh, rules, name))

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_boxed)


def state_shardings(state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shards optimizer state like the parameters it belongs to; what belongs to none is replicated.

    A leaf belongs to the parameter whose key path ends its own and whose shape it has. Left to propagation, XLA
    replicates moments.

    Args:
      state: abstract optimizer state. params, shardings: abstract parameters and their shardings, the same tree.
    """
    known = {
        tuple(_key(k) for k in path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }
    replicated = NamedSharding(mesh, PartitionSpec())

    def one(path, leaf):
        keys = tuple(_key(k) for k in path)
        for start in range(len(keys)):
            if keys[start:] in known and known[keys[start:]][0] == leaf.shape:
                return known[keys[start:]][1]
        return replicated

    return jax.tree_util.tree_map_with_path(one, state)


def _key(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))


def batch_shardings(spec: Any, mesh: Mesh) -> Any:
    """Rows over data and fsdp; the second axis over sequence. Raises UserError if the rows do not divide."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]

    def one(path, leaf):
        if leaf.shape[0] % ways:
            raise UserError(
                f"the batch has {leaf.shape[0]} rows ({path_name(path)}), which {ways} devices "
                f"(data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}) do not divide."
            )
        along = None
        if mesh.shape["sequence"] > 1 and len(leaf.shape) > 1:
            if leaf.shape[1] % mesh.shape["sequence"]:
                raise UserError(f"{leaf.shape[1]} tokens of a row do not divide by sequence={mesh.shape['sequence']}.")
            along = "sequence"
        return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), *([along] if len(leaf.shape) > 1 else [])))

    return jax.tree_util.tree_map_with_path(one, spec)


def assert_sharded_like(state: Any, params: Any) -> None:
    """Raises AssertionError naming each leaf of optimizer state that belongs to a parameter but is placed otherwise."""
    known = {
        tuple(_key(k) for k in path): (leaf.shape, leaf.sharding)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    wrong = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        keys = tuple(_key(k) for k in path)
        for start in range(len(keys)):
            shape, sharding = known.get(keys[start:], (None, None))
            if shape == leaf.shape:
                if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
                    wrong.append(f"{path_name(path)}: {leaf.sharding.spec} instead of {sharding.spec}")
                break
    if wrong:
        raise AssertionError("optimizer state is not sharded like its parameters: " + "; ".join(wrong))
