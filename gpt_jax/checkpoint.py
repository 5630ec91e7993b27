"""Checkpoints: any tree of arrays, saved while training goes on, restored onto any mesh.

    directory/400/                    a whole checkpoint: it gets this name only when complete
    directory/400.orbax-checkpoint-tmp   one being saved, or left by a killed process (removed at the next start)
    directory/frozen/                 parameters that never change, stored once per run

At gs:// nothing can be renamed: a checkpoint is complete when it holds commit_success.txt, which is written last and
deleted first.

What is in one of these folders is in `checkpoint_folder`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from gpt_jax.checkpoint_folder import (
    TEMPORARY,
    DamagedCheckpoint,
    Response,
    abstract_of,
    check_fit,
    clean,
    damaged_frozen,
    flush,
    is_complete,
    is_key,
    named_leaves,
    nest,
    read_leaves,
    read_manifest,
    remove,
    restore_exactly,
    show,
    some,
    start_save,
    unflatten,
    verify_folder,
)
from gpt_jax.errors import UserError
from gpt_jax.files import is_no_space, no_space_message
from gpt_jax.remote import at_store, reaching, run_folder


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
                clean(self.directory)
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
            response = start_save(folder, state, metadata or {})
        self._pending = self._executor.submit(self._finish, step, response, dict(valid_losses or {}))

    def _finish(self, step: int, response: Response, valid_losses: Mapping[int, float]) -> None:
        folder = self.directory / str(step)
        with self._explain(folder, f"checkpoint {step}"):
            response.result()
        if jax.process_index() == 0:
            flush(folder)
            keep = self._keep(self.all_steps(), valid_losses)
            for old in self.all_steps():
                if old not in keep:
                    remove(self.directory / str(old))

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
                for leftover in self.directory.glob(f"{folder.name}{TEMPORARY}*"):
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
                    remove(self.directory / str(later))
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
        if not jax.tree.leaves(tree) or is_complete(folder):
            return
        with self._explain(folder, "the frozen parameters"):
            start_save(folder, tree, {}).result()

    def discard_frozen(self) -> None:
        """Deletes what `save_frozen` stored: of a start that was killed before its first checkpoint."""
        if jax.process_index() == 0 and is_complete(self.directory / "frozen"):
            remove(self.directory / "frozen")
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
        return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and is_complete(p))


def find_checkpoint(path: str | os.PathLike, step: int | None = None) -> tuple[pathlib.Path, int]:
    """Finds a checkpoint given a run directory, its folder of checkpoints, or the checkpoint itself.

    Returns:
      (folder of checkpoints, step): `step` if given, else the newest.

    Raises:
      UserError: there is none there, or not this one (the ones there are named).
    """
    given = run_folder(path, "the checkpoint's path")
    with reaching(given):
        whole = given.name.isdigit() and is_complete(given) and not list_steps(given)
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
        return read_manifest(folder / str(step))["metadata"]


def list_arrays(path: str | os.PathLike, step: int | None = None) -> list[str]:
    """Returns the names of the arrays in a checkpoint, frozen parameters left out."""
    folder, step = find_checkpoint(path, step)
    with _naming_the_good_one(folder, step):
        return list(read_manifest(folder / str(step))["arrays"])


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
        return restore_exactly(folder / str(step), abstract_state, f"checkpoint {step} in {folder}")


def restore_frozen(directory: str | os.PathLike, abstract: Any) -> Any:
    """Reads the frozen parameters of a folder of checkpoints; a tree without leaves is returned as it is."""
    if not jax.tree.leaves(abstract):
        return abstract
    folder = run_folder(directory, "the folder of checkpoints") / "frozen"
    try:
        return restore_exactly(folder, abstract, "the frozen parameters")
    except DamagedCheckpoint as damage:
        raise damaged_frozen(folder, str(damage)) from damage


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
        stored = read_manifest(folder / str(step))["arrays"]
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
            f"no parameter of {path} has a name and shape of this model's: it has {some(done.ignored)}, "
            f"this model {some(done.initialised)}."
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
                arrays = read_manifest(place)["arrays"]
                wanted = {stored: abstract_of(arrays[stored]) for stored in source.values()}
                values = read_leaves(place, wanted)
                nest({name: values[stored] for name, stored in source.items()}, tree)
            return tree
        leaves = named_leaves(abstract)
        found: dict[str, Any] = {}
        for place, source in zip(folders, sources, strict=True):
            arrays = read_manifest(place)["arrays"]
            wanted = {source[n]: leaf for n, leaf in leaves.items() if n in source}
            check_fit({n: arrays[n] for n in wanted}, wanted, f"checkpoint {step} in {folder}")
            values = read_leaves(place, wanted)
            found |= {n: values[source[n]] for n in leaves if n in source}
        missing = [n for n in leaves if n not in found]
        if missing:
            raise UserError(f"checkpoint {step} in {folder} has no parameter {some(missing)}.")
        return unflatten(abstract, found)


def _merge(folders: Sequence[pathlib.Path], sources: Sequence[Mapping[str, str]], tree: Any) -> tuple[Any, Restored]:
    """Puts stored leaves into `tree`; `sources` says for each folder {name: name there}."""
    leaves = named_leaves(tree)
    restored: dict[str, Any] = {}
    other_shape: dict[str, str] = {}
    ignored: list[str] = []
    for folder, source in zip(folders, sources, strict=True):
        arrays = read_manifest(folder)["arrays"]
        wanted = {}
        for name, stored in source.items():
            there = abstract_of(arrays[stored])
            if name not in leaves:
                ignored.append(name)
                continue
            here = leaves[name]
            if there.shape != tuple(here.shape) or is_key(there) != is_key(here):
                other_shape[name] = f"{name} ({show(there)} there, {show(here)} here)"
                continue
            wanted[name] = jax.ShapeDtypeStruct(there.shape, there.dtype, sharding=here.sharding)
        values = read_leaves(folder, {source[name]: leaf for name, leaf in wanted.items()})
        for name in wanted:
            value = values[source[name]]
            restored[name] = value if value.dtype == leaves[name].dtype else value.astype(leaves[name].dtype)
    initialised = [other_shape.get(n, n) for n in leaves if n not in restored]
    return unflatten(tree, leaves | restored), Restored(
        tuple(sorted(restored)), tuple(sorted(initialised)), tuple(sorted(ignored))
    )


def _parameters(folder: pathlib.Path, step: int, root: str) -> tuple[list[pathlib.Path], list[dict[str, str]]]:
    """Returns where a run's parameters lie: folders, and for each {name without root: name there}."""
    checkpoint = folder / str(step)
    names = [n for n in read_manifest(checkpoint)["arrays"] if n.startswith(f"{root}/")]
    if not names:
        raise UserError(f"checkpoint {step} in {folder} has no {root!r} part.")
    folders, sources = [checkpoint], [{n.removeprefix(f"{root}/"): n for n in names}]
    if (folder / "frozen").is_dir():
        folders.append(folder / "frozen")
        sources.append({n: n for n in read_manifest(folder / "frozen")["arrays"]})
    return folders, sources


@contextlib.contextmanager
def _naming_the_good_one(folder: pathlib.Path, step: int) -> Iterator[None]:
    """Tells the user which checkpoint is damaged and which is the newest one that can be read instead."""
    try:
        yield
    except DamagedCheckpoint as damage:
        frozen = folder / "frozen"
        broken = verify_folder(frozen) if frozen.is_dir() else None
        if broken and verify_folder(folder / str(step)) is None:
            raise damaged_frozen(frozen, broken) from damage
        good = next((s for s in reversed(list_steps(folder)) if s < step and verify(folder, s) is None), None)
        if good is None:
            advice = "there is no other good one"
        else:
            advice = f"the newest good one is {good}: delete {folder / str(step)} to go on from there"
        if broken:
            advice = f"so are the frozen parameters at {frozen}"
        raise DamagedCheckpoint(f"checkpoint {step} in {folder} is damaged ({damage}); {advice}.") from damage


def verify(path: str | os.PathLike, step: int) -> str | None:
    """Reads a checkpoint in full; returns what is wrong with it, or None."""
    folder, step = find_checkpoint(path, step)
    return verify_folder(folder / str(step))


def _wait_for_all_processes(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
