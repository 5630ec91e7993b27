"""Checkpoints: any tree of arrays, saved while training goes on, restored onto any mesh.

    directory/400/                    a whole checkpoint: it gets this name only when complete
    directory/400.orbax-checkpoint-tmp   one being saved, or left by a killed process (removed at the next start)
    directory/frozen/                 parameters that never change, stored once per run

At gs:// nothing can be renamed: a checkpoint is complete when it holds commit_success.txt, which is written last and
deleted first.

What is in one of these folders is in `checkpoint_folder`; reading a part of one, by name, in `checkpoint_parts`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from gpt_jax.checkpoint_folder import (
    TEMPORARY,
    DamagedCheckpoint,
    Response,
    clean,
    damaged_frozen,
    flush,
    is_complete,
    read_manifest,
    remove,
    restore_exactly,
    start_save,
    verify_folder,
)
from gpt_jax.distributed import gather
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
        gather("checkpoints opened")
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
        if gather(step in self.all_steps())[0]:  # a host may see late what another has written: process 0 decides
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

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """Returns the caller's metadata of a checkpoint (None: the newest)."""
        return read_metadata(self.directory, step)

    def restore(self, step: int | None, abstract_state: Any) -> Any:
        """Reads a whole state. See `restore`."""
        return restore(self.directory, step, abstract_state)

    def save_frozen(self, tree: Any) -> None:
        """Stores parameters that never change, unless they are stored already. Waits until they are."""
        folder = self.directory / "frozen"
        if not jax.tree.leaves(tree) or gather(is_complete(folder))[0]:
            return
        with self._explain(folder, "the frozen parameters"):
            start_save(folder, tree, {}).result()

    def discard_frozen(self) -> None:
        """Deletes what `save_frozen` stored: of a start that was killed before its first checkpoint."""
        if jax.process_index() == 0 and is_complete(self.directory / "frozen"):
            remove(self.directory / "frozen")
        gather("frozen discarded")

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
    with naming_the_good_one(folder, step):
        return read_manifest(folder / str(step))["metadata"]


def list_arrays(path: str | os.PathLike, step: int | None = None) -> list[str]:
    """Returns the names of the arrays in a checkpoint, frozen parameters left out."""
    folder, step = find_checkpoint(path, step)
    with naming_the_good_one(folder, step):
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
    with naming_the_good_one(folder, step):
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


@contextlib.contextmanager
def naming_the_good_one(folder: pathlib.Path, step: int) -> Iterator[None]:
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
