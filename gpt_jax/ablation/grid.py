"""What an ablation is: a question, a base config, arms (overrides of it) and seeds that every arm shares.

A file in configs/ablations/ defines `get_ablation()`:

    def get_ablation():
        return Ablation(
            question="Does tanh after the feed-forward layer hurt?",
            config=tiny_text(),
            arms={"gelu_tanh": {}, "relu_tanh": {"model.ffn": "relu_tanh"}},
            metrics=("valid/bits_per_byte",),
        )

Arms may also come from the algebra of grids, lists of overrides: `product(over("model.ffn", "gelu", "relu2"),
over("model.num_heads", 2, 4))`, `zipped` (in step) and `chain` (one after the other).

A run that must come before (pre-training, a reference model) is named in `before`; an arm starts from it by
{"init.from": "@NAME"} and changes it by {"@NAME.steps": 100}. Its seed is the cell's, unless its config sets one above
0. Cells that ask for the same one share it.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.config import Config, call_config_file, find_config, resolve, to_dict
from gpt_jax.config_changes import FREE, classify, flatten
from gpt_jax.data.cache import content_hash
from gpt_jax.errors import UserError, choose

Overrides = dict[str, Any]


def over(key: str, *values: Any) -> list[Overrides]:
    """A grid of one key: [{key: value}, ...]."""
    return [{key: value} for value in values]


def product(*grids: Sequence[Overrides]) -> list[Overrides]:
    """Every combination of one entry of each grid; the last grid varies fastest."""
    return [_merged(entries) for entries in itertools.product(*grids)]


def zipped(*grids: Sequence[Overrides]) -> list[Overrides]:
    """The first entries together, then the second ones, ...; grids of one length.

    Raises:
      UserError: grids of different lengths.
    """
    if len({len(grid) for grid in grids}) > 1:
        raise UserError(f"zipped grids have {', '.join(str(len(g)) for g in grids)} entries; they need equally many.")
    return [_merged(entries) for entries in zip(*grids, strict=True)]


def chain(*grids: Sequence[Overrides]) -> list[Overrides]:
    """The entries of all grids, one after the other."""
    return [dict(entry) for grid in grids for entry in grid]


def _merged(entries: Sequence[Overrides]) -> Overrides:
    out: Overrides = {}
    for entry in entries:
        if double := out.keys() & entry.keys():
            raise UserError(f"two grids set {sorted(double)[0]!r}; each key belongs to one.")
        out |= entry
    return out


def name_of(overrides: Mapping[str, Any]) -> str:
    """An arm's name from what it changes: 'ffn=relu2, num_heads=4'; 'base' if nothing."""
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in overrides.items()) or "base"


@dataclasses.dataclass(frozen=True)
class Ablation:
    """See the module.

    Attributes:
      question: one sentence that the report begins with.
      config: of every arm, before its overrides: a ConfigDict or nested mapping.
      arms: overrides by name, or a list of overrides (a grid), which name themselves.
      metrics: what is compared, in this order: columns of metrics.jsonl at the last step ("valid/loss", ...), or
        what `measures` adds. The first is the one the figures show.
      baseline: the arm that others are compared with; "" is the first.
      seeds: how many; first_seed: the first of them. Each arm runs under each.
      against: arms that are compared with other arms than the baseline, {arm: (arm, ...)}: of several the first that
        has the metric. What others are compared with is not tested itself.
      before: configs of runs that come first, by name. always: those that every cell needs, for its measures.
      measures: import paths of functions of a finished Cell -> {name: value}.
      reading: what a reader should know, e.g. what is not comparable.
      folders: of the arms' cells; {} makes them of names. They stay what they are where only some arms are asked for.
    """

    question: str
    config: Any
    arms: Any
    metrics: tuple[str, ...] = ("valid/loss",)
    baseline: str = ""
    seeds: int = 5
    first_seed: int = 1
    against: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    before: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    always: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()
    reading: str = ""
    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        arms = self.arms
        if not isinstance(arms, Mapping):
            named = [(name_of(entry), entry) for entry in arms]
            arms = dict(named)
            if len(arms) < len(named):
                raise UserError("two arms of the grid change the same: give names, {'name': {...}, ...}.")
        if len(arms) < 1:
            raise UserError("an ablation needs at least one arm.")
        object.__setattr__(self, "arms", {str(name): dict(entry) for name, entry in arms.items()})
        for arm, own in self.arms.items():
            if sets := next((key for key in own if re.fullmatch(r"(@[^.]+\.)?seed", key)), ""):
                where = "the config in `before` may set one" if sets != "seed" else "`seeds` and `first_seed` say which"
                raise UserError(f"the arm {arm!r} sets {sets!r}, but arms share their seeds; {where}.")
        if not self.arms.keys() <= self.folders.keys():
            object.__setattr__(self, "folders", _folders(self.arms))
        object.__setattr__(self, "baseline", self.baseline or next(iter(self.arms)))
        choose("the ablation's baseline", self.baseline, self.arms)
        for arm, others in self.against.items():
            choose("an arm of `against`", arm, self.arms)
            for other in others:
                choose(f"what the arm {arm!r} is compared with", other, self.arms)
        for name in self.always:
            choose("a run of `always`", name, self.before)
        if self.seeds < 1:
            raise UserError(f"seeds is {self.seeds}; an ablation needs at least 1, and 2 for an interval.")


@dataclasses.dataclass(frozen=True)
class Before:
    """A run that comes before a cell: its config and where it lies."""

    name: str
    config: Config
    path: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
      index: among all cells. arm, seed, config, path: of the run. before: the runs it needs; start: the name of the
        one of them whose weights it starts from, or "".
    """

    index: int
    arm: str
    seed: int
    config: Config
    path: pathlib.Path
    before: tuple[Before, ...] = ()
    start: str = ""

    @property
    def name(self) -> str:
        return f"{self.arm} / seed {self.seed}"

    @property
    def identity(self) -> str:
        """A hash of all of its config (and those of the runs before it) that numbers depend on."""
        return content_hash([identity(self.config), *(identity(b.config) for b in self.before)])

    def run_before(self, name: str) -> Before:
        """Returns the run of that name; raises UserError if this cell has none."""
        choose(f"a run before {self.name}", name, [b.name for b in self.before])
        return next(b for b in self.before if b.name == name)


def load_ablation(
    name: str, overrides: Mapping[str, Any] | None = None, *, seeds: int = 0, arms: Sequence[str] = ()
) -> Ablation:
    """Reads an ablation file by path or name.

    Args:
      overrides: of the config of every arm, {"steps": "50"}, before what arms set; "@NAME.steps" changes a run before.
      seeds: instead of the file's; 0 keeps it. arms: only these (the baseline is always kept); () is all.

    Raises:
      UserError: no such file or arm, no `get_ablation` in it, an unknown key.
    """
    if "seed" in (overrides or {}):
        raise UserError(
            f"--config.seed is {overrides['seed']!r}, but arms share their seeds: --seeds says how many, `first_seed` "
            "of the file which is the first."
        )
    path = find_config(name)
    ablation = call_config_file(path, "get_ablation")
    if not isinstance(ablation, Ablation):
        raise UserError(f"{path}: get_ablation() returned {type(ablation).__name__}, not an Ablation.")
    if overrides:
        changed = {name: {**own, **overrides} for name, own in ablation.arms.items()}
        first: dict[str, str] = {}
        for name, own in changed.items():
            other = first.setdefault(repr(sorted(own.items(), key=lambda item: item[0])), name)
            if other != name:
                keys = ", ".join(f"--config.{key}" for key in overrides)
                raise UserError(f"{keys}: the arms {other!r} and {name!r} would be the same.")
        ablation = dataclasses.replace(ablation, arms=changed)
    for arm in arms:
        choose("--arm", arm, ablation.arms)
    if arms:
        wanted = {*arms, ablation.baseline, *(o for a in arms for o in ablation.against.get(a, ()))}
        kept = {n: own for n, own in ablation.arms.items() if n in wanted}
        against = {arm: other for arm, other in ablation.against.items() if arm in kept}
        ablation = dataclasses.replace(ablation, arms=kept, against=against)
    return dataclasses.replace(ablation, seeds=seeds) if seeds else ablation


def cells_of(ablation: Ablation, workdir: str | pathlib.Path) -> list[Cell]:
    """The cells in the order they run: all arms of the first seed, then of the second, ...

    So whatever has finished when one looks is paired.
    """
    workdir, cells = pathlib.Path(workdir), []
    for seed in range(ablation.first_seed, ablation.first_seed + ablation.seeds):
        for arm, overrides in ablation.arms.items():
            own = {key: value for key, value in overrides.items() if not key.startswith("@")}
            config = _resolve(ablation.config, own, seed, arm)
            start = config.init.source[1:] if config.init.source.startswith("@") else ""
            names = dict.fromkeys([*ablation.always, *([start] if start else [])])
            before = tuple(_before(ablation, name, overrides, seed, workdir, arm) for name in names)
            if start:
                source = next(str(b.path) for b in before if b.name == start)
                config = dataclasses.replace(config, init=dataclasses.replace(config.init, source=source))
            path = workdir / "cells" / ablation.folders[arm] / f"seed{seed}"
            cells.append(Cell(len(cells), arm, seed, config, path, before, start))
    return cells


def _before(ablation: Ablation, name: str, overrides: Overrides, seed: int, workdir: pathlib.Path, arm: str) -> Before:
    choose(f"init.from of the arm {arm!r}", f"@{name}", [f"@{n}" for n in ablation.before])
    prefix = f"@{name}."
    own = {key.removeprefix(prefix): value for key, value in overrides.items() if key.startswith(prefix)}
    tree = ablation.before[name]
    config = _resolve(tree, own, tree["seed"] if tree.get("seed", 0) > 0 else seed, f"@{name}")
    return Before(name, config, workdir / "before" / f"{_slug(name)}-{identity(config)[:12]}")


def _resolve(tree: Any, overrides: Overrides, seed: int, name: str) -> Config:
    tree = tree.to_dict() if hasattr(tree, "to_dict") else dict(tree)
    config = resolve(tree, {"log.tensorboard": False, "name": name, **overrides, "seed": seed})
    return dataclasses.replace(config, log=dataclasses.replace(config.log, console_every_steps=config.steps))


def identity(config: Config) -> str:
    """A hash of the keys that numbers depend on: not where it runs, how often it logs, or where init.from lies."""
    flat = {key: value for key, value in flatten(to_dict(config)).items() if classify(key)[0] != FREE}
    flat["init.from"] = bool(flat.get("init.from"))
    return content_hash(flat)


def _folders(arms: Mapping[str, Overrides]) -> dict[str, str]:
    """A folder for each arm, of its name; numbered where two names would share one."""
    slugs = {arm: _slug(arm) for arm in arms}
    if len(set(slugs.values())) < len(slugs):
        slugs = {arm: f"{i:02d}-{slug}" for i, (arm, slug) in enumerate(slugs.items())}
    return slugs


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()[:80] or "arm"
