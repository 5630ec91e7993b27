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
MOST_REPLICATED = 0.02  # of the parameters' bytes under FSDP: more is a rule that is missing

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
    sizes: Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    *,
    slices: int = 0,
    slice_axis: str = "data",
    **named: int,
) -> Mesh:
    """Returns the mesh (data, fsdp, tensor, sequence); a size of -1 is what is left (default: fsdp).

    Devices of several slices, which a slower network (DCN) joins than the one inside a slice (ICI), are laid out slice
    after slice along `slice_axis`: every other axis stays within a slice.

    Args:
      sizes, named: devices along each axis. devices: None is all.
      slices: parts of equal size that a slower network joins; 0 is what the devices say (TPU slices; else one).
      slice_axis: the axis that goes across slices, whose size they divide.

    Raises:
      UserError: sizes whose product is not the number of devices, two of -1, or an axis that slices do not divide.
    """
    devices = list(devices if devices is not None else jax.devices())
    given = {**dict.fromkeys(AXES, 1), "fsdp": -1, **(sizes or {}), **named}
    for axis in given:
        choose("a mesh axis", axis, AXES)
    choose("mesh.slice_axis", slice_axis, ("data", "fsdp"))
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
    groups = _slices(devices, slices)
    at = AXES.index(slice_axis)
    if shape[at] % len(groups):
        raise UserError(
            f"mesh.{slice_axis} is {shape[at]}, which the {len(groups)} slices do not divide: make it a multiple of "
            "them, or let mesh.slice_axis name the axis that goes across slices (data | fsdp)."
        )
    inner = [size // len(groups) if axis == at else size for axis, size in enumerate(shape)]
    grid = np.concatenate([_lay_out(inner, group) for group in groups], axis=at)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: list[jax.Device], slices: int) -> list[list[jax.Device]]:
    """Devices by slice: as many equal parts as asked for, or by what the devices say."""
    if not slices:
        numbers = [getattr(d, "slice_index", None) or 0 if d.platform == "tpu" else 0 for d in devices]
        return [[d for d, at in zip(devices, numbers, strict=True) if at == n] for n in sorted(set(numbers))]
    if slices < 0 or len(devices) % slices:
        raise UserError(f"mesh.slices is {slices}, which does not divide the {len(devices)} devices.")
    size = len(devices) // slices
    return [devices[i : i + size] for i in range(0, len(devices), size)]


def _lay_out(shape: Sequence[int], devices: list[jax.Device]) -> np.ndarray:
    """Devices of one slice in the given shape, neighbours in the mesh being neighbours in the machine."""
    if devices[0].platform != "tpu" or len(devices) == 1:
        return np.asarray(devices).reshape(shape)
    from jax.experimental import mesh_utils

    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # no product of whole machine axes: cut some
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def check_rules(rules: Any) -> None:
    """Raises UserError for rules of `mesh.rules` that are no pairs, name a logical or mesh axis that there is not, or
    name more mesh axes than can be."""
    for rule in rules:
        if not isinstance(rule, (tuple, list)) or len(rule) != 2:
            raise UserError(f"mesh.rules has {rule!r}; a rule is a pair (logical axis, mesh axis), e.g. ('mlp', None).")
        axis, target = rule
        choose("a logical axis of mesh.rules", axis, dict.fromkeys(name for name, _ in DEFAULT_RULES))
        several = isinstance(target, (tuple, list))
        names = target if several else () if target is None else (target,)
        for name in names:
            choose(f"the mesh axis of {axis!r} in mesh.rules", name, AXES)
        if len(set(names)) < len(names):
            raise UserError(f"mesh.rules has {rule!r}, which names a mesh axis twice.")
        if several and axis == "sequence":
            raise UserError(f"mesh.rules has {rule!r}; 'sequence' takes one mesh axis or None.")


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
    """Rows over data and fsdp; tokens, the last axis of what is as long as a batch's `tokens`, over sequence.

    Raises UserError if rows or tokens do not divide.
    """
    ways, pieces = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["sequence"]
    leaves = jax.tree_util.tree_leaves_with_path(spec)
    lengths = {leaf.shape[-1] for path, leaf in leaves if path and _key(path[-1]) == "tokens"}

    def one(path, leaf):
        if leaf.shape[0] % ways:
            raise UserError(
                f"the batch has {leaf.shape[0]} rows ({path_name(path)}), which {ways} devices "
                f"(data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}) do not divide."
            )
        others = [None] * (len(leaf.shape) - 1)
        if pieces > 1 and others and leaf.shape[-1] in lengths:
            if leaf.shape[-1] % pieces:
                raise UserError(f"{leaf.shape[-1]} tokens of a row do not divide by sequence={pieces}.")
            others[-1] = "sequence"
        return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), *others))

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


def replicated_bytes(shapes: Any, shardings: Any) -> tuple[float, list[str]]:
    """Which parameters FSDP leaves whole: (their part of all bytes, "name (MB)" of each, the largest first).

    A parameter counts if its sharding does not use the fsdp axis and that axis has more than one device: each fsdp
    shard then holds it whole.

    Args:
      shapes: (abstract) parameters. shardings: of each, the same tree.
    """
    total, found = 0, []
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    ):
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        total += size
        used = {axis for entry in sharding.spec for axis in (entry if isinstance(entry, tuple) else (entry,))}
        if sharding.mesh.shape["fsdp"] > 1 and "fsdp" not in used:
            found.append((size, path_name(path)))
    found.sort(reverse=True)
    return sum(size for size, _ in found) / max(total, 1), [f"{name} ({size / 1e6:.3g} MB)" for size, name in found]


def too_replicated(part: float, names: Sequence[str], at_most: float = MOST_REPLICATED) -> str:
    """Returns a sentence that names the parameters of `replicated_bytes` if they are more than `at_most`; else ''."""
    if part <= at_most:
        return ""
    return (
        f"{part:.1%} of the parameters' bytes are whole on every fsdp shard (at most {at_most:.0%} should be): "
        f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}; add rules for their axes to mesh.rules."
    )
