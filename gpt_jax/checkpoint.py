"""Checkpoints: any tree of arrays, saved while training goes on, restored onto any mesh. The only user of Orbax.

    directory/400/                    a whole checkpoint: it gets this name only when complete
    directory/400.orbax-checkpoint-tmp   one being saved, or left by a killed process (removed at the next start)
    directory/frozen/                 parameters that never change, stored once per run

At gs:// nothing can be renamed: a checkpoint is complete when it holds commit_success.txt, which is written last and
deleted first.

A leaf is stored under its name, its path in the tree joined by '/', e.g. 'params/model/blocks/mlp/up/kernel'.
Beside the arrays lie their shapes, dtypes and check sums, and the caller's metadata, as JSON; nothing is pickled.
A check sum is an exact integer computed on the devices, the same for every mesh: no damaged file goes unnoticed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from gpt_jax.errors import UserError, nearest
from gpt_jax.files import clean_leftovers, fsync_folder, is_no_space, no_space_message, remove_folder
from gpt_jax.remote import at_store, reaching, run_folder

_STATE = "state"
_TEMPORARY = ".orbax-checkpoint-tmp"
_COMMITTED = "commit_success.txt"


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be read back as it was written."""


class DoesNotFit(UserError):
    """A checkpoint whose names, shapes or dtypes are not those of the state to restore."""


def steps_to_keep(
    steps: Iterable[int], valid_losses: Mapping[int, float], keep_last: int, keep_best: int, keep_every_steps: int
) -> set[int]:
    """Returns which checkpoints to keep: the newest always, the last n, the best n by validation loss, multiples of k.

    Args:
      steps: the steps that have a checkpoint.
      valid_losses: validation loss by step; steps without a (finite) one are never among the best.
      keep_last, keep_best: how many; 0 keeps none for this reason.
      keep_every_steps: keeps the multiples of this; 0 is off.
    """
    steps = sorted(steps)
    keep = set(steps[-max(keep_last, 1) :])
    measured = [s for s in steps if math.isfinite(valid_losses.get(s, math.nan))]
    keep |= set(sorted(measured, key=lambda s: (valid_losses[s], s))[:keep_best])
    if keep_every_steps:
        keep |= {s for s in steps if s and s % keep_every_steps == 0}
    return keep


class Checkpointer:
    """Saves the state of a run in the background and keeps the checkpoints that the policy names.

    Every process of a run makes the same calls. `save` has copied (or holds) what it needs when it returns, so the
    arrays may be donated to the next step. Errors of a background save surface in `check`, `wait` or the next `save`.

    Args:
      directory: where the checkpoints lie, a folder or a gs:// URL; made if absent. What killed saves left there is
        removed, so only one run may use it at a time.
      keep_last, keep_best, keep_every_steps: see `steps_to_keep`.
    """

    def __init__(
        self, directory: str | os.PathLike, keep_last: int = 2, keep_best: int = 1, keep_every_steps: int = 0
    ) -> None:
        self.directory = run_folder(directory, "the folder of checkpoints")
        self._keep = functools.partial(
            steps_to_keep, keep_last=keep_last, keep_best=keep_best, keep_every_steps=keep_every_steps
        )
        if jax.process_index() == 0:
            with reaching(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
                _clean(self.directory)
        _wait_for_all_processes("checkpointer")
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future | None = None

    def save(
        self,
        step: int,
        state: Any,
        *,
        metadata: Mapping[str, Any] | None = None,
        valid_losses: Mapping[int, float] | None = None,
    ) -> None:
        """Starts to save `state` as the checkpoint of `step`; does nothing if that step is stored already.

        Args:
          step: optimizer updates done.
          state: any tree of arrays (typed PRNG keys too). Leave out what `save_frozen` has stored.
          metadata: JSON values to keep beside the arrays.
          valid_losses: validation loss by step, as measured so far, for the choice of the best to keep.

        Raises:
          UserError: the previous save failed for lack of space.
        """
        self.wait()
        if step in self.all_steps():
            return
        folder = self.directory / str(step)
        with self._explain(folder, f"checkpoint {step}"):
            response = _start_save(folder, state, metadata or {})
        self._pending = self._executor.submit(self._finish, step, response, dict(valid_losses or {}))

    def _finish(self, step: int, response: ocp.AsyncResponse, valid_losses: Mapping[int, float]) -> None:
        folder = self.directory / str(step)
        with self._explain(folder, f"checkpoint {step}"):
            response.result()
        if jax.process_index() == 0:
            _flush(folder)
            keep = self._keep(self.all_steps(), valid_losses)
            for old in self.all_steps():
                if old not in keep:
                    _remove(self.directory / str(old))

    @contextlib.contextmanager
    def _explain(self, folder: pathlib.Path, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if at_store(folder):
                with reaching(folder):
                    raise
            if not is_no_space(error):
                raise
            if jax.process_index() == 0:
                for leftover in self.directory.glob(f"{folder.name}{_TEMPORARY}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            raise UserError(no_space_message(folder, what)) from error

    def wait(self) -> None:
        """Waits until the checkpoint being saved is complete; raises what went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raises what went wrong in a save that has ended, without waiting for one that has not."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """Waits for the save under way and ends the thread."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def all_steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, ascending."""
        return list_steps(self.directory)

    def latest(self) -> int | None:
        """Returns the newest complete checkpoint's step, or None."""
        return max(self.all_steps(), default=None)

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints after `step`: the run goes on from there and will write its own."""
        self.wait()
        if jax.process_index() == 0:
            for later in self.all_steps():
                if later > step:
                    _remove(self.directory / str(later))
        _wait_for_all_processes("discarded")

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """Returns the caller's metadata of a checkpoint (None: the newest)."""
        return read_metadata(self.directory, step)

    def restore(self, step: int | None, abstract_state: Any) -> Any:
        """Reads a whole state. See `restore`."""
        return restore(self.directory, step, abstract_state)

    def restore_some(self, step: int | None, state: Any, only: str | None = None) -> tuple[Any, Restored]:
        """Replaces leaves of `state` by the stored ones of the same name and shape. See `restore_some`."""
        return restore_some(self.directory, step, state, only)

    def save_frozen(self, tree: Any) -> None:
        """Stores parameters that never change, unless they are stored already. Waits until they are."""
        folder = self.directory / "frozen"
        if not jax.tree.leaves(tree) or _is_complete(folder):
            return
        with self._explain(folder, "the frozen parameters"):
            _start_save(folder, tree, {}).result()

    def discard_frozen(self) -> None:
        """Deletes what `save_frozen` stored: of a start that was killed before its first checkpoint."""
        if jax.process_index() == 0 and _is_complete(self.directory / "frozen"):
            _remove(self.directory / "frozen")
        _wait_for_all_processes("frozen discarded")

    def restore_frozen(self, abstract: Any) -> Any:
        """Reads what `save_frozen` stored, as `restore` reads a state."""
        return restore_frozen(self.directory, abstract)


def list_steps(directory: str | os.PathLike) -> list[int]:
    """Returns the steps of the complete checkpoints in a folder, ascending."""
    directory = run_folder(directory, "the folder of checkpoints")
    with reaching(directory):
        if not directory.is_dir():
            return []
        return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and _is_complete(p))


def find_checkpoint(path: str | os.PathLike, step: int | None = None) -> tuple[pathlib.Path, int]:
    """Finds a checkpoint given a run directory, its folder of checkpoints, or the checkpoint itself.

    Returns:
      (folder of checkpoints, step): `step` if given, else the newest.

    Raises:
      UserError: there is none there, or not this one (the ones there are named).
    """
    given = run_folder(path, "the checkpoint's path")
    with reaching(given):
        whole = given.name.isdigit() and _is_complete(given) and not list_steps(given)
        if whole and not (given / "checkpoints").is_dir():
            if step is not None and step != int(given.name):
                raise UserError(f"{str(path)!r} is the checkpoint of step {int(given.name)}, not of step {step}.")
            return given.parent, int(given.name)
        folder = given / "checkpoints" if (given / "checkpoints").is_dir() else given
    steps = list_steps(folder)
    if not steps:
        raise UserError(f"no checkpoint in {str(path)!r}: give a run directory or a checkpoint.")
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise UserError(f"no checkpoint of step {step} in {str(folder)!r}; there are {', '.join(map(str, steps))}.")
    return folder, step


def read_metadata(path: str | os.PathLike, step: int | None = None) -> dict[str, Any]:
    """Returns the metadata that was saved with a checkpoint (config, code version, tokenizer)."""
    folder, step = find_checkpoint(path, step)
    with _naming_the_good_one(folder, step):
        return _read_manifest(folder / str(step))["metadata"]


def list_arrays(path: str | os.PathLike, step: int | None = None) -> list[str]:
    """Returns the names of the arrays in a checkpoint, frozen parameters left out."""
    folder, step = find_checkpoint(path, step)
    with _naming_the_good_one(folder, step):
        return list(_read_manifest(folder / str(step))["arrays"])


def restore(path: str | os.PathLike, step: int | None, abstract_state: Any) -> Any:
    """Reads a whole state.

    Args:
      path: what `find_checkpoint` takes.
      step: which checkpoint; None: the newest.
      abstract_state: a tree of ShapeDtypeStruct, with shardings where it is to lie across devices.

    Returns:
      The same tree with arrays, placed by those shardings, whatever the mesh they were saved from.

    Raises:
      UserError: a name, shape or dtype differs (listed), or the checkpoint is damaged (the newest good one is named).
    """
    folder, step = find_checkpoint(path, step)
    with _naming_the_good_one(folder, step):
        return _restore_exactly(folder / str(step), abstract_state, f"checkpoint {step} in {folder}")


def restore_frozen(directory: str | os.PathLike, abstract: Any) -> Any:
    """Reads the frozen parameters of a folder of checkpoints; a tree without leaves is returned as it is."""
    if not jax.tree.leaves(abstract):
        return abstract
    folder = run_folder(directory, "the folder of checkpoints") / "frozen"
    return _restore_exactly(folder, abstract, "the frozen parameters")


@dataclasses.dataclass(frozen=True)
class Restored:
    """What restoring by name did: names of leaves, sorted.

    restored: taken from the checkpoint.
    initialised: left as they were; those that the checkpoint has with another shape say so.
    ignored: in the checkpoint only.
    """

    restored: tuple[str, ...]
    initialised: tuple[str, ...]
    ignored: tuple[str, ...]

    def describe(self) -> str:
        """Returns three lines for people."""
        return "\n".join(
            f"{what} {len(names)}{': ' + ', '.join(names) if names else ''}"
            for what, names in (
                ("restored", self.restored),
                ("initialised", self.initialised),
                ("ignored", self.ignored),
            )
        )


def restore_some(path: str | os.PathLike, step: int | None, tree: Any, only: str | None = None) -> tuple[Any, Restored]:
    """Replaces the leaves of a tree of arrays by the checkpoint's of the same name and shape.

    Args:
      path, step: as in `restore`.
      tree: a tree of arrays; each restored leaf gets its sharding and dtype.
      only: a regex (re.search) that a leaf's name must match to be restored.

    Returns:
      (the tree, what was done).
    """
    folder, step = find_checkpoint(path, step)
    with _naming_the_good_one(folder, step):
        stored = _read_manifest(folder / str(step))["arrays"]
        source = {n: n for n in stored if only is None or re.search(only, n)}
        return _merge([folder / str(step)], [source], tree)


def restore_subset(
    path: str | os.PathLike,
    params: Any,
    *,
    root: str = "params",
    rename: Sequence[tuple[str, str]] = (),
    step: int | None = None,
) -> tuple[Any, Restored]:
    """Starts parameters from those of another run, by name (`init.from`).

    Args:
      path: a run directory, its folder of checkpoints, or a checkpoint.
      params: a tree of arrays.
      root: which part of the other run's state to take: 'params' or 'ema'; its frozen parameters belong to both.
      rename: (regex, replacement) pairs applied in turn to the other run's names, e.g. (('^generator/', 'model/'),).
      step: which checkpoint; None: the newest.

    Returns:
      (params, what was restored, initialised, ignored), names without the root.

    Raises:
      UserError: no name fits, two names become one by `rename`, or the checkpoint is damaged.
    """
    folder, step = find_checkpoint(path, step)
    with _naming_the_good_one(folder, step):
        folders, sources = _parameters(folder, step, root)
        for source in sources:
            for name in list(source):
                new = name
                for pattern, replacement in rename:
                    new = re.sub(pattern, replacement, new)
                if new != name and any(new in s for s in sources):
                    raise UserError(f"rename turns {name!r} into {new!r}, a name that another parameter has already.")
                source[new] = source.pop(name)
        params, done = _merge(folders, sources, params)
    if not done.restored:
        raise UserError(
            f"no parameter of {path} has a name and shape of this model's: it has {_some(done.ignored)}, "
            f"this model {_some(done.initialised)}."
        )
    return params, done


def load_params(
    path: str | os.PathLike, abstract: Any | None = None, *, root: str = "params", step: int | None = None
) -> Any:
    """Reads a run's parameters, frozen ones merged in.

    Args:
      path, step: as in `restore`.
      abstract: tree of ShapeDtypeStruct (with shardings) to read; None reads nested dicts onto the first device.
      root: 'params' or 'ema'.

    Raises:
      UserError: a parameter of `abstract` is not there or has another shape; the checkpoint is damaged.
    """
    folder, step = find_checkpoint(path, step)
    with _naming_the_good_one(folder, step):
        folders, sources = _parameters(folder, step, root)
        if abstract is None:
            tree: dict[str, Any] = {}
            for place, source in zip(folders, sources, strict=True):
                arrays = _read_manifest(place)["arrays"]
                wanted = {stored: _abstract_of(arrays[stored]) for stored in source.values()}
                values = _read(place, wanted)
                _nest({name: values[stored] for name, stored in source.items()}, tree)
            return tree
        leaves = _named_leaves(abstract)
        found: dict[str, Any] = {}
        for place, source in zip(folders, sources, strict=True):
            arrays = _read_manifest(place)["arrays"]
            wanted = {source[n]: leaf for n, leaf in leaves.items() if n in source}
            _check_fit({n: arrays[n] for n in wanted}, wanted, f"checkpoint {step} in {folder}")
            values = _read(place, wanted)
            found |= {n: values[source[n]] for n in leaves if n in source}
        missing = [n for n in leaves if n not in found]
        if missing:
            raise UserError(f"checkpoint {step} in {folder} has no parameter {_some(missing)}.")
        return _unflatten(abstract, found)


# ---- names and leaves


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Returns {name: leaf} in the tree's order; a name is the path joined by '/'."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    if len(set(names)) < len(names):
        double = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"two leaves have the name {double!r}")
    return {name or "value": leaf for name, (_, leaf) in zip(names, paths, strict=True)}


def _unflatten(tree: Any, leaves: Mapping[str, Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[name] for name in _named_leaves(tree)])


def _nest(leaves: Mapping[str, Any], into: dict[str, Any] | None = None) -> dict[str, Any]:
    """Turns {'a/b': x} into {'a': {'b': x}}: the form on disk, readable without this code."""
    tree: dict[str, Any] = {} if into is None else into
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> jax.Array:
    """A leaf as an array that can be stored: the data of a PRNG key, else itself."""
    if hasattr(leaf, "dtype") and _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _plain_abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        if isinstance(sharding, jax.sharding.NamedSharding):  # the key's data has one axis more, which is not split
            rank = len(leaf.shape)
            spec = (*sharding.spec, *[None] * (rank - len(sharding.spec)), None)
            sharding = jax.sharding.NamedSharding(sharding.mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@jax.jit
def _check_sum(x: jax.Array) -> jax.Array:
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
    return {name: f"{int(_check_sum(x)):08x}" for name, x in leaves.items()}


# ---- reading and writing one folder


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


def _start_save(folder: pathlib.Path, tree: Any, metadata: Mapping[str, Any]) -> ocp.AsyncResponse:
    named = _named_leaves(tree)
    keys = {n: str(jax.random.key_impl(x)) for n, x in named.items() if hasattr(x, "dtype") and _is_key(x)}
    leaves = {name: _plain(leaf) for name, leaf in named.items()}
    sums = _check_sums(leaves)
    arrays = {
        n: {"shape": list(x.shape), "dtype": str(x.dtype), "sum": sums[n]} | ({"key": keys[n]} if n in keys else {})
        for n, x in leaves.items()
    }
    manifest = {"format": 1, "arrays": arrays, "metadata": dict(metadata)}
    manifest["sum"] = _digest(manifest)
    with _context(at_store(folder)):
        return ocp.save_checkpointables_async(folder, {_STATE: _nest(leaves)}, custom_metadata=manifest)


def _digest(manifest: Mapping[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "sum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Returns {'arrays': {name: {shape, dtype, sum}}, 'metadata': ...} of a checkpoint."""
    try:
        with _context():
            manifest = ocp.checkpointables_metadata(folder).custom_metadata
        whole = manifest["sum"] == _digest(manifest)
    except Exception as error:
        _refuse_if_unreachable(folder, error)
        raise DamagedCheckpoint(f"its metadata cannot be read ({_reason(error)})") from error
    if not whole:
        raise DamagedCheckpoint("the check sum of its metadata is wrong")
    return manifest


def _abstract_of(entry: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    if "key" in entry:
        key = jax.eval_shape(functools.partial(jax.random.key, impl=entry["key"]), 0)
        return jax.ShapeDtypeStruct(tuple(entry["shape"][:-1]), key.dtype)
    return jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]))


def _read(folder: pathlib.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the named leaves, checks their sums and returns them by name, placed by the shardings of `wanted`."""
    if not wanted:
        return {}
    arrays = _read_manifest(folder)["arrays"]
    plain = {name: _plain_abstract(leaf) for name, leaf in wanted.items()}
    try:
        with _context():
            tree = ocp.load_checkpointables(folder, {_STATE: _nest(plain)})[_STATE]
        leaves = _named_leaves(tree)
        sums = _check_sums(leaves)
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise
        _refuse_if_unreachable(folder, error)
        raise DamagedCheckpoint(_reason(error)) from error
    wrong = [name for name in plain if sums[name] != arrays[name]["sum"]]
    if wrong:
        raise DamagedCheckpoint(f"the check sum of {_some(wrong)} is wrong")
    return {
        name: jax.random.wrap_key_data(leaves[name], impl=arrays[name]["key"]) if _is_key(leaf) else leaves[name]
        for name, leaf in wanted.items()
    }


def _refuse_if_unreachable(folder: pathlib.Path, error: Exception) -> None:
    """Raises UserError where a store could not be asked: that says nothing of the checkpoint. Objects that are absent,
    or are not what they should be, are damage."""
    damaged = isinstance(error, (FileNotFoundError, ValueError, KeyError)) or "NOT_FOUND" in str(error)
    if at_store(folder) and not damaged:
        with reaching(folder):
            raise error


def _restore_exactly(folder: pathlib.Path, abstract: Any, what: str) -> Any:
    if not folder.is_dir():
        raise UserError(f"{what} should lie at {folder}, where there is nothing.")
    leaves = _named_leaves(abstract)
    arrays = _read_manifest(folder)["arrays"]
    _check_fit(arrays, leaves, what)
    return _unflatten(abstract, _read(folder, leaves))


def _check_fit(arrays: Mapping[str, Any], leaves: Mapping[str, Any], what: str) -> None:
    """Raises a UserError listing where stored arrays and wanted leaves differ in name, shape or dtype."""
    differences = []
    for name in leaves:
        if name in arrays:
            there, here = _abstract_of(arrays[name]), leaves[name]
            if (there.shape, there.dtype) != (tuple(here.shape), here.dtype):
                differences.append(f"{name} is {_show(there)} there and {_show(here)} here")
    differences += [f"{n} is only in the checkpoint" for n in arrays if n not in leaves]
    differences += [f"{n} is only in this run{nearest(n, arrays)}" for n in leaves if n not in arrays]
    if differences:
        raise DoesNotFit(f"{what} does not fit this run: {_some(differences, '; ', 4)}.")


def _merge(folders: Sequence[pathlib.Path], sources: Sequence[Mapping[str, str]], tree: Any) -> tuple[Any, Restored]:
    """Puts stored leaves into `tree`; `sources` says for each folder {name: name there}."""
    leaves = _named_leaves(tree)
    restored: dict[str, Any] = {}
    other_shape: dict[str, str] = {}
    ignored: list[str] = []
    for folder, source in zip(folders, sources, strict=True):
        arrays = _read_manifest(folder)["arrays"]
        wanted = {}
        for name, stored in source.items():
            there = _abstract_of(arrays[stored])
            if name not in leaves:
                ignored.append(name)
                continue
            here = leaves[name]
            if there.shape != tuple(here.shape) or _is_key(there) != _is_key(here):
                other_shape[name] = f"{name} ({_show(there)} there, {_show(here)} here)"
                continue
            wanted[name] = jax.ShapeDtypeStruct(there.shape, there.dtype, sharding=here.sharding)
        values = _read(folder, {source[name]: leaf for name, leaf in wanted.items()})
        for name in wanted:
            value = values[source[name]]
            restored[name] = value if value.dtype == leaves[name].dtype else value.astype(leaves[name].dtype)
    initialised = [other_shape.get(n, n) for n in leaves if n not in restored]
    return _unflatten(tree, leaves | restored), Restored(
        tuple(sorted(restored)), tuple(sorted(initialised)), tuple(sorted(ignored))
    )


def _parameters(folder: pathlib.Path, step: int, root: str) -> tuple[list[pathlib.Path], list[dict[str, str]]]:
    """Returns where a run's parameters lie: folders, and for each {name without root: name there}."""
    checkpoint = folder / str(step)
    names = [n for n in _read_manifest(checkpoint)["arrays"] if n.startswith(f"{root}/")]
    if not names:
        raise UserError(f"checkpoint {step} in {folder} has no {root!r} part.")
    folders, sources = [checkpoint], [{n.removeprefix(f"{root}/"): n for n in names}]
    if (folder / "frozen").is_dir():
        folders.append(folder / "frozen")
        sources.append({n: n for n in _read_manifest(folder / "frozen")["arrays"]})
    return folders, sources


@contextlib.contextmanager
def _naming_the_good_one(folder: pathlib.Path, step: int) -> Iterator[None]:
    """Tells the user which checkpoint is damaged and which is the newest one that can be read instead."""
    try:
        yield
    except DamagedCheckpoint as damage:
        good = next((s for s in reversed(list_steps(folder)) if s < step and verify(folder, s) is None), None)
        frozen = folder / "frozen"
        if good is None:
            advice = "there is no other good one"
        else:
            advice = f"the newest good one is {good}: delete {folder / str(step)} to go on from there"
        if frozen.is_dir() and _verify_folder(frozen):
            advice = f"so are the frozen parameters at {frozen}"
        raise DamagedCheckpoint(f"checkpoint {step} in {folder} is damaged ({damage}); {advice}.") from damage


def verify(path: str | os.PathLike, step: int) -> str | None:
    """Reads a checkpoint in full; returns what is wrong with it, or None."""
    folder, step = find_checkpoint(path, step)
    return _verify_folder(folder / str(step))


def _verify_folder(folder: pathlib.Path) -> str | None:
    try:
        _read(folder, {name: _abstract_of(entry) for name, entry in _read_manifest(folder)["arrays"].items()})
    except DamagedCheckpoint as damage:
        return str(damage)
    return None


def _is_complete(folder: pathlib.Path) -> bool:
    """Tells whether a checkpoint, or the frozen parameters, has been written to its end."""
    return (folder / _COMMITTED).exists() if at_store(folder) else folder.is_dir()


def _clean(directory: pathlib.Path) -> None:
    """Removes what killed saves and removals left in a folder of checkpoints."""
    if at_store(directory):
        for place in directory.iterdir() if directory.is_dir() else ():
            if (place.name.isdigit() or place.name == "frozen") and not _is_complete(place):
                place.rmtree(missing_ok=True)
        return
    clean_leftovers(directory)
    for leftover in directory.glob(f"*{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _remove(folder: pathlib.Path) -> None:
    """Deletes a checkpoint so that a crash halfway leaves none that looks whole."""
    if not at_store(folder):
        remove_folder(folder)
        return
    with reaching(folder):
        (folder / _COMMITTED).unlink(missing_ok=True)
        folder.rmtree(missing_ok=True)


def _flush(folder: pathlib.Path) -> None:
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


def _wait_for_all_processes(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _show(leaf: Any) -> str:
    return f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"


def _some(names: Sequence[str], separator: str = ", ", most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}"
