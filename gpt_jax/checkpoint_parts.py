"""A part of a checkpoint, by name: another run's parameters to start from or to use, or what a run keeps of its own."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from gpt_jax.checkpoint import find_checkpoint, naming_the_good_one
from gpt_jax.checkpoint_folder import (
    abstract_of,
    check_fit,
    is_key,
    named_leaves,
    nest,
    read_leaves,
    read_manifest,
    show,
    some,
    unflatten,
)
from gpt_jax.errors import UserError


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
    with naming_the_good_one(folder, step):
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
    with naming_the_good_one(folder, step):
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
    with naming_the_good_one(folder, step):
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
