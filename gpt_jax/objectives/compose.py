"""Objectives made of objectives: `Mixture` over different sub-batches, `Sum` over the same batch.

Both share parameters by root name: children that name the same root ("model") train the same weights. A term is named
'child/term', and its coefficient is the child's times the term's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gpt_jax.data.formats import Part
from gpt_jax.errors import UserError
from gpt_jax.model.random import fold_name
from gpt_jax.objectives.base import (
    Batch,
    Host,
    Objective,
    Params,
    Setting,
    build_objective,
    check_coefficient,
    check_options,
    check_spec,
    rows_of,
)
from gpt_jax.options import check_type, option
from gpt_jax.sharding import path_name


@dataclasses.dataclass(frozen=True)
class _Composition(Objective):
    children: Mapping[str, Objective]
    child_coefs: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The model that the first child that has one trains: what samples are drawn from."""
        return next((child.model for child in self.children.values() if hasattr(child, "model")), None)

    @property
    def generates(self) -> bool:
        return any(child.generates for child in self.children.values())

    @property
    def coefs(self) -> dict[str, Any]:
        out = {}
        for name, child in self.children.items():
            factor = self.child_coefs.get(name, 1.0)
            for term, coef in child.coefs.items():
                if callable(coef):
                    out[f"{name}/{term}"] = lambda step, coef=coef, factor=factor: factor * coef(step)
                else:
                    out[f"{name}/{term}"] = factor * coef
        return out

    @property
    def frozen(self) -> Sequence[str]:
        return tuple(dict.fromkeys(regex for child in self.children.values() for regex in child.frozen))

    @property
    def copies(self) -> dict[str, str]:
        return {root: other for child in self.children.values() for root, other in child.copies.items()}

    @property
    def batch_terms(self) -> frozenset[str]:
        return frozenset(f"{name}/{term}" for name, child in self.children.items() for term in child.batch_terms)

    def _part(self, batch: Batch, name: str) -> Batch:
        return batch[name]

    def init(self, key: Array, batch: Batch) -> Params:
        """Children are initialised in order; a root that an earlier child made is shared, and must be the same tree.

        Raises:
          UserError: it is not, or it is a head whose outputs are the labels of other tasks.
        """
        roots: Params = {}
        makers: dict[str, str] = {}
        for name, child in self.children.items():
            for root, tree in child.init(key, self._part(batch, name)).items():
                maker = makers.setdefault(root, name)
                own, others = (_labels(self.children[part]) for part in (name, maker))
                if root != "model" and own and others and own != others:
                    raise UserError(
                        f"objectives {maker!r} ({', '.join(task for task, _ in others)}) and {name!r} "
                        f"({', '.join(task for task, _ in own)}) would share the head {root!r}, but not its labels: "
                        "name the tasks of both in one of them."
                    )
                if root in roots and _shapes(roots[root]) != _shapes(tree):
                    raise UserError(f"objective {name!r} shares the root {root!r}, but its parameters differ.")
                roots.setdefault(root, tree)
        return roots

    def prepare(self, batch: Batch, keys: Array, step: Array) -> Batch:
        out = {}
        for name, child in self.children.items():
            part = self._part(batch, name)
            out[name] = child.prepare(part, self._keys(child, part, keys, name), step)
        return out

    def weights(self, batch: Batch) -> dict[str, Array]:
        return {
            f"{name}/{term}": weight
            for name, child in self.children.items()
            for term, weight in child.weights(batch[name]).items()
        }

    def loss(self, params: Params, batch: Batch, keys: Array, train: bool) -> tuple[dict, dict]:
        sums, metrics = {}, {}
        for name, child in self.children.items():
            s, m = child.loss(params, batch[name], self._keys(child, batch[name], keys, name), train)
            sums |= {f"{name}/{term}": value for term, value in s.items()}
            metrics |= {f"{name}/{metric}": value for metric, value in m.items()}
        return sums, metrics

    @property
    def needs_scores(self) -> bool:
        return any(child.needs_scores for child in self.children.values())

    def score(self, params: Params, batch: Batch, keys: Array) -> dict[str, Any]:
        return {
            name: child.score(params, batch[name], self._keys(child, batch[name], keys, name))
            for name, child in self.children.items()
            if child.needs_scores
        }

    def weigh(self, batch: Batch, scores: dict[str, Any], step: Array) -> Batch:
        return {
            name: child.weigh(batch[name], scores[name], step) if name in scores else batch[name]
            for name, child in self.children.items()
        }

    def _keys(self, child: Objective, part: Batch, keys: Array, name: str) -> Array:
        # A child's rows are the first of the batch's, also within a micro-batch, which takes every n-th row.
        return fold_name(keys[: child.num_rows(part)], name)


def _labels(objective: Objective) -> list[tuple[str, tuple[str, ...]]]:
    """(name, labels) of the tasks whose labels the outputs of an objective's head are."""
    tasks = getattr(objective, "tasks", ())
    return [] if isinstance(tasks, Mapping) else [(task.name, task.labels) for task in tasks if task.labels]


def _shapes(tree: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [(path_name(path), jnp.shape(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


@dataclasses.dataclass(frozen=True)
class Mixture(_Composition):
    """Several objectives, each on its own sub-batch: batch = {child: sub-batch}.

    Attributes:
      children: objectives by name. child_coefs: factor of each. row_counts: rows of each in a global batch.
    """

    row_counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    tasks: Mapping[str, Any] = option(
        {}, "{name: {'name': objective, 'rows': n, 'coef': 1.0, 'data': {data keys of its own}, options...}}"
    )

    @classmethod
    def rows(cls, options: Mapping[str, Any], host: Host) -> dict[str, Part]:
        parts = {}
        for name, (spec, rows, _, data) in _children(options, host.batch_size).items():
            own = rows_of(spec, dataclasses.replace(host, batch_size=rows))
            if isinstance(own, Mapping):
                raise UserError(f"objective.tasks has a mixture, {name!r}; name its tasks in the outer one.")
            parts[name] = Part(own, data, rows)
        return parts

    @classmethod
    def build(cls, options: Mapping[str, Any], setting: Setting) -> Mixture:
        children, coefs, counts = {}, {}, {}
        for name, (spec, rows, coef, _) in _children(check_options(cls, options), setting.batch_size).items():
            tasks = setting.tasks.get(name, ()) if isinstance(setting.tasks, Mapping) else ()
            children[name] = build_objective(spec, dataclasses.replace(setting, batch_size=rows, tasks=tasks))
            coefs[name], counts[name] = coef, rows
        return cls(children=children, child_coefs=coefs, row_counts=counts)

    def parts(self) -> dict[str, tuple[Objective, float]]:
        factors = {name: self.child_coefs.get(name, 1.0) for name in self.children}
        return {
            f"{name}/{part}" if part else name: (inner, factors[name] * coef)
            for name, child in self.children.items()
            for part, (inner, coef) in child.parts().items()
        }

    def feed(self, source: Any) -> Any:
        return type(source)({name: self.children[name].feed(part) for name, part in source.parts.items()})

    def batch_spec(self, batch_size: int, context_length: int) -> Any:
        total = sum(self.row_counts.values()) or len(self.children)
        share = {name: self.row_counts.get(name, 1) * batch_size // total for name in self.children}
        return {name: child.batch_spec(share[name], context_length) for name, child in self.children.items()}


def _parted(key: str, spec: Any, keys: Sequence[str]) -> tuple[dict, dict]:
    """Parts a child's table in two: the objective's own, and what it is to the composition: rows, coef, data (`keys`).

    Raises:
      UserError: one of them is not what it should be, or the child is no table.
    """
    check_type(key, spec, "Mapping[str, Any]")
    given = {name: spec[name] for name in keys if name in spec}
    check_coefficient(f"{key}.coef", given.get("coef", 1.0))
    check_type(f"{key}.rows", given.get("rows", 1), "int")
    if given.get("rows", 1) < 1:
        raise UserError(f"{key}.rows is {given['rows']}; it must be at least 1.")
    check_type(f"{key}.data", given.get("data", {}), "Mapping[str, Any]")
    return {name: value for name, value in spec.items() if name not in keys}, given


def _children(options: Mapping[str, Any], batch_size: int) -> dict[str, tuple[dict, int, float, dict]]:
    """Reads a mixture's tasks: {name: (objective's table, rows, coefficient, data keys)}; rows not given are shared."""
    tasks = options.get("tasks", {})
    if not tasks:
        raise UserError("objective.tasks is empty; a mixture needs at least one task.")
    parted = {name: _parted(f"objective.tasks.{name}", spec, ("rows", "coef", "data")) for name, spec in tasks.items()}
    left = batch_size - sum(given.get("rows", 0) for _, given in parted.values())
    others = [name for name, (_, given) in parted.items() if "rows" not in given]
    out = {}
    for name, (own, given) in parted.items():
        share = left // len(others) if others else 0
        if others and name == others[0]:
            share += left % len(others)
        out[name] = (own, given.get("rows", share), given.get("coef", 1.0), dict(given.get("data", {})))
    counts = {name: rows for name, (_, rows, _, _) in out.items()}
    if sum(counts.values()) != batch_size or min(counts.values()) < 1:
        raise UserError(
            f"the rows of objective.tasks are {counts}; they must be at least 1 and sum to batch_size={batch_size}."
        )
    return out


def part_rows(options: Mapping[str, Any], batch_size: int) -> dict[str, int]:
    """Returns the rows of each of a mixture's tasks in a batch."""
    return {name: rows for name, (_, rows, _, _) in _children(options, batch_size).items()}


@dataclasses.dataclass(frozen=True)
class Sum(_Composition):
    """Several objectives on the same batch; each prepares its own copy under its own keys."""

    terms: Mapping[str, Any] = option({}, "{name: {'name': objective, 'coef': 1.0, options...}}")

    @property
    def tasks(self) -> Any:
        """Of the first term that has any: all are built for the same."""
        return next((child.tasks for child in self.children.values() if getattr(child, "tasks", ())), ())

    @classmethod
    def rows(cls, options: Mapping[str, Any], host: Host) -> Any:
        found = [rows_of(spec, host) for spec, _ in _terms(options).values()]
        other = next((rows for rows in found if rows is not None), None)
        if any(rows is not None and rows != other for rows in found):
            raise UserError(
                "the terms of a sum share one batch, but their rows differ; use a mixture for objectives with rows of "
                "their own."
            )
        return other

    @classmethod
    def build(cls, options: Mapping[str, Any], setting: Setting) -> Sum:
        terms = _terms(check_options(cls, options))
        children = {name: build_objective(spec, setting) for name, (spec, _) in terms.items()}
        return cls(children=children, child_coefs={name: coef for name, (_, coef) in terms.items()})

    def batch_spec(self, batch_size: int, context_length: int) -> Any:
        specs: dict[str, Any] = {}
        for child in self.children.values():
            specs |= child.batch_spec(batch_size, context_length)
        return specs

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """The predictions of the first term that makes any."""
        able = [child for child in self.children.values() if type(child).predict is not Objective.predict]
        return able[0].predict(params, batch) if able else super().predict(params, batch)

    def _part(self, batch: Batch, name: str) -> Batch:
        return batch


def _terms(options: Mapping[str, Any]) -> dict[str, tuple[dict, float]]:
    """Reads a sum's terms: {name: (objective's table, coefficient)}."""
    terms = options.get("terms", {})
    if not terms:
        raise UserError("objective.terms is empty; a sum needs at least one term.")
    out = {}
    for name, spec in terms.items():
        own, given = _parted(f"objective.terms.{name}", spec, ("coef",))
        if check_spec(own).parts is not Objective.parts:
            raise UserError(
                f"objective.terms.{name} is a {own['name']}, which has batches of its own; the terms of a sum share "
                "one: use a mixture."
            )
        out[name] = (own, given.get("coef", 1.0))
    return out
