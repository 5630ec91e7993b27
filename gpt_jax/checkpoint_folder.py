"""One folder, of a checkpoint or of the frozen parameters: written, read, checked, removed. The only user of Orbax.

A leaf is stored under its name, its path in the tree joined by '/', e.g. 'params/model/blocks/mlp/up/kernel'.
Beside the arrays lie their shapes, dtypes and check sums, and the caller's metadata, as JSON; nothing is pickled.
A check sum is an exact integer computed on the devices, the same for every mesh: no damaged file goes unnoticed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from gpt_jax.errors import UserError, nearest
from gpt_jax.files import clean_leftovers, fsync_folder, remove_folder
from gpt_jax.remote import at_store, reaching

TEMPORARY = ".orbax-checkpoint-tmp"
_STATE = "state"
_COMMITTED = "commit_success.txt"

Response = ocp.AsyncResponse  # of a save under way: `result()` waits for its end


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be read back as it was written."""


class DoesNotFit(UserError):
    """A checkpoint whose names, shapes or dtypes are not those of the state to restore."""


def start_save(folder: pathlib.Path, tree: Any, metadata: Mapping[str, Any]) -> ocp.AsyncResponse:
    named = named_leaves(tree)
    keys = {n: str(jax.random.key_impl(x)) for n, x in named.items() if hasattr(x, "dtype") and is_key(x)}
    leaves = {name: _plain(leaf) for name, leaf in named.items()}
    sums = _check_sums(leaves)
    arrays = {
        n: {"shape": list(x.shape), "dtype": str(x.dtype), "sum": sums[n]} | ({"key": keys[n]} if n in keys else {})
        for n, x in leaves.items()
    }
    manifest = {"format": 1, "arrays": arrays, "metadata": dict(metadata)}
    manifest["sum"] = _digest(manifest)
    with _context(at_store(folder)):
        return ocp.save_checkpointables_async(folder, {_STATE: nest(leaves)}, custom_metadata=manifest)


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Returns {'arrays': {name: {shape, dtype, sum}}, 'metadata': ...} of a checkpoint."""
    try:
        with _context():
            manifest = ocp.checkpointables_metadata(folder).custom_metadata
        whole = manifest["sum"] == _digest(manifest)
    except Exception as error:
        refuse_if_unreachable(folder, error)
        raise DamagedCheckpoint(f"its metadata cannot be read ({_reason(error)})") from error
    if not whole:
        raise DamagedCheckpoint("the check sum of its metadata is wrong")
    return manifest


def read_leaves(folder: pathlib.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the named leaves, checks their sums and returns them by name, placed by the shardings of `wanted`."""
    if not wanted:
        return {}
    arrays = read_manifest(folder)["arrays"]
    plain = {name: _plain_abstract(leaf) for name, leaf in wanted.items()}
    try:
        with _context():
            tree = ocp.load_checkpointables(folder, {_STATE: nest(plain)})[_STATE]
        leaves = named_leaves(tree)
        sums = _check_sums(leaves)
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise
        refuse_if_unreachable(folder, error)
        raise DamagedCheckpoint(_reason(error)) from error
    wrong = [name for name in plain if sums[name] != arrays[name]["sum"]]
    if wrong:
        raise DamagedCheckpoint(f"the check sum of {some(wrong)} is wrong")
    return {
        name: jax.random.wrap_key_data(leaves[name], impl=arrays[name]["key"]) if is_key(leaf) else leaves[name]
        for name, leaf in wanted.items()
    }


def restore_exactly(folder: pathlib.Path, abstract: Any, what: str) -> Any:
    if not folder.is_dir():
        raise UserError(f"{what} should lie at {folder}, where there is nothing.")
    leaves = named_leaves(abstract)
    arrays = read_manifest(folder)["arrays"]
    check_fit(arrays, leaves, what)
    return unflatten(abstract, read_leaves(folder, leaves))


def verify_folder(folder: pathlib.Path) -> str | None:
    try:
        read_leaves(folder, {name: abstract_of(entry) for name, entry in read_manifest(folder)["arrays"].items()})
    except DamagedCheckpoint as damage:
        return str(damage)
    return None


def damaged_frozen(folder: pathlib.Path, damage: str) -> DamagedCheckpoint:
    """The error that says where a run's frozen parameters are damaged."""
    return DamagedCheckpoint(
        f"the frozen parameters at {folder} are damaged ({damage}); every checkpoint of the run needs them: "
        "bring that folder back from a copy, or begin the run anew."
    )


def is_complete(folder: pathlib.Path) -> bool:
    """Tells whether a checkpoint, or the frozen parameters, has been written to its end."""
    return (folder / _COMMITTED).exists() if at_store(folder) else folder.is_dir()


def clean(directory: pathlib.Path) -> None:
    """Removes what killed saves and removals left in a folder of checkpoints."""
    if at_store(directory):
        for place in directory.iterdir() if directory.is_dir() else ():
            if (place.name.isdigit() or place.name == "frozen") and not is_complete(place):
                place.rmtree(missing_ok=True)
        return
    clean_leftovers(directory)
    for leftover in directory.glob(f"*{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove(folder: pathlib.Path) -> None:
    """Deletes a checkpoint so that a crash halfway leaves none that looks whole."""
    if not at_store(folder):
        remove_folder(folder)
        return
    with reaching(folder):
        (folder / _COMMITTED).unlink(missing_ok=True)
        folder.rmtree(missing_ok=True)


def flush(folder: pathlib.Path) -> None:
    """Makes a complete checkpoint durable before older ones are deleted."""
    if at_store(folder):
        return  # an object is durable once it is written
    for place, _, files in os.walk(folder):
        for name in files:
            handle = os.open(os.path.join(place, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        fsync_folder(place)
    fsync_folder(folder.parent)


def abstract_of(entry: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    if "key" in entry:
        key = jax.eval_shape(functools.partial(jax.random.key, impl=entry["key"]), 0)
        return jax.ShapeDtypeStruct(tuple(entry["shape"][:-1]), key.dtype)
    return jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]))


def check_fit(arrays: Mapping[str, Any], leaves: Mapping[str, Any], what: str) -> None:
    """Raises a UserError listing where stored arrays and wanted leaves differ in name, shape or dtype."""
    differences = []
    for name in leaves:
        if name in arrays:
            there, here = abstract_of(arrays[name]), leaves[name]
            if (there.shape, there.dtype) != (tuple(here.shape), here.dtype):
                differences.append(f"{name} is {show(there)} there and {show(here)} here")
    differences += [f"{n} is only in the checkpoint" for n in arrays if n not in leaves]
    differences += [f"{n} is only in this run{nearest(n, arrays)}" for n in leaves if n not in arrays]
    if differences:
        raise DoesNotFit(f"{what} does not fit this run: {some(differences, '; ', 4)}.")


def refuse_if_unreachable(folder: pathlib.Path, error: Exception) -> None:
    """Raises UserError where a store could not be asked: that says nothing of the checkpoint. Objects that are absent,
    or are not what they should be, are damage."""
    damaged = isinstance(error, (FileNotFoundError, ValueError, KeyError)) or "NOT_FOUND" in str(error)
    if at_store(folder) and not damaged:
        with reaching(folder):
            raise error


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns {name: leaf} in the tree's order; a name is the path joined by '/'."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    if len(set(names)) < len(names):
        double = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"two leaves have the name {double!r}")
    return {name or "value": leaf for name, (_, leaf) in zip(names, paths, strict=True)}


def unflatten(tree: Any, leaves: Mapping[str, Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[name] for name in named_leaves(tree)])


def nest(leaves: Mapping[str, Any], into: dict[str, Any] | None = None) -> dict[str, Any]:
    """Turns {'a/b': x} into {'a': {'b': x}}: the form on disk, readable without this code."""
    tree: dict[str, Any] = {} if into is None else into
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> jax.Array:
    """A leaf as an array that can be stored: the data of a PRNG key, else itself."""
    if hasattr(leaf, "dtype") and is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _plain_abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        if isinstance(sharding, jax.sharding.NamedSharding):  # the key's data has one axis more, which is not split
            rank = len(leaf.shape)
            spec = (*sharding.spec, *[None] * (rank - len(sharding.spec)), None)
            sharding = jax.sharding.NamedSharding(sharding.mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@jax.jit
def check_sum(x: jax.Array) -> jax.Array:
    """sum_i (2 i + 1) bits_i mod 2^32 over the elements: exact in any order, changed by any single flipped bit."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    size = jnp.dtype(x.dtype).itemsize
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def _check_sums(leaves: Mapping[str, jax.Array]) -> dict[str, str]:
    # One after the other: programs that sum over many simulated devices may wait for each other's threads forever.
    jax.block_until_ready(list(leaves.values()))
    return {name: f"{int(check_sum(x)):08x}" for name, x in leaves.items()}


def _context(remote: bool = False) -> ocp.Context:
    context = ocp.Context()
    context.array.saving.use_ocdbt = True
    context.array.saving.use_zarr3 = True
    context.array.saving.use_compression = False
    context.array.loading.enable_padding_and_truncation = False
    context.array.loading.raise_array_data_missing_error = True
    context.asynchronous.timeout_secs = 4 * 3600
    if not remote:
        context.atomicity.mode = ocp.options.AtomicityMode.ATOMIC_RENAME
    context.pytree.loading.partial_load = True
    return context


def _digest(manifest: Mapping[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "sum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def show(leaf: Any) -> str:
    return f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"


def some(names: Sequence[str], separator: str = ", ", most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}"
