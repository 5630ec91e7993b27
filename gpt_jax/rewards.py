"""Rewards: plain functions from generated answers to numbers, on the host, registered by name.

A reward is made once by its factory, `factory(**options)`, and is then (answers, examples) -> a number per answer; the
examples are those of a task of kind text_to_text, whose `source` is the prompt and whose `references` are good answers.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt_jax.edit_distance import levenshtein
from gpt_jax.errors import UserError, nearest
from gpt_jax.options import import_path

Reward = Callable[[Sequence[str], Sequence[Any]], list[float]]


def exact_match() -> Reward:
    """1 where the answer is a reference but for outer space, else 0."""

    def reward(answers: Sequence[str], examples: Sequence[Any]) -> list[float]:
        pairs = zip(answers, examples, strict=True)
        return [float(a.strip() in [r.strip() for r in example.references]) for a, example in pairs]

    return reward


def edit_distance() -> Reward:
    """1 - Levenshtein(answer, reference) / the longer one's characters, of the closest reference: 1 is exact."""

    def one(answer: str, reference: str) -> float:
        return 1.0 - levenshtein(answer, reference) / max(len(answer), len(reference), 1)

    def reward(answers: Sequence[str], examples: Sequence[Any]) -> list[float]:
        pairs = zip(answers, examples, strict=True)
        return [max(one(a.strip(), r.strip()) for r in example.references) for a, example in pairs]

    return reward


def arithmetic() -> Reward:
    """1 where the answer is the right number for a question such as 'What is 48 plus 76?', computed anew; else 0."""
    from gpt_jax.tasks.synthetic_arithmetic import solve

    def reward(answers: Sequence[str], examples: Sequence[Any]) -> list[float]:
        return [float(a.strip() == solve(example.source)) for a, example in zip(answers, examples, strict=True)]

    return reward


def format(pattern: str = r"\s*\S.*") -> Reward:
    """1 where the whole answer matches a regular expression ('.' is any character), else 0."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"reward format: pattern {pattern!r} is no regular expression: {error}.") from None
    return lambda answers, examples: [float(compiled.fullmatch(a) is not None) for a in answers]


def length(target: int = 0) -> Reward:
    """Characters of the answer, or with `target` minus their distance from so many: to log, or to shape."""
    return lambda answers, examples: [float(-abs(len(a) - target) if target else len(a)) for a in answers]


def classifier(workdir: str, label: str, with_prompt: bool = False) -> Reward:
    """The probability of a label by a run with the objective `classify`, of the answer or of prompt and answer."""
    from gpt_jax.classifier import load_classifier

    found = load_classifier(workdir)
    if label not in found.labels:
        raise UserError(
            f"reward classifier: label {label!r}{nearest(label, found.labels)} is not one of {workdir!r}: "
            f"{', '.join(found.labels)}."
        )
    place = found.labels.index(label)

    def reward(answers: Sequence[str], examples: Sequence[Any]) -> list[float]:
        texts = [e.source + a if with_prompt else a for a, e in zip(answers, examples, strict=True)]
        return found.probabilities(texts)[:, place].tolist()

    return reward


REGISTRY: dict[str, Callable[..., Reward]] = {
    "exact_match": exact_match,
    "edit_distance": edit_distance,
    "arithmetic": arithmetic,
    "format": format,
    "length": length,
    "classifier": classifier,
}


_KINDS = {"str": (str, "a text"), "int": (int, "a whole number"), "bool": (bool, "True or False")}


def read_specs(specs: Any) -> list[dict[str, Any]]:
    """Returns the table of each reward, with "name", "weight" and "as", the name that is logged.

    Raises:
      UserError: one that is neither a name nor a table with one, a weight that is no number.
    """
    if not isinstance(specs, (list, tuple)):
        raise UserError(f"objective.rewards is {specs!r}; a list of names or of tables with a 'name' is needed.")
    out = []
    for spec in specs:
        given = {"name": spec} if isinstance(spec, str) else spec
        if not isinstance(given, Mapping) or not isinstance(given.get("name"), str) or not given["name"]:
            raise UserError(f"objective.rewards has {spec!r}; a name, or a table with a 'name', is needed.")
        name, weight = given["name"], given.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise UserError(f"objective.rewards: the weight of {name} is {weight!r}; a number is needed.")
        out.append({**given, "weight": float(weight), "as": given.get("as") or name.rpartition(":")[2]})
    return out


def make_rewards(specs: Sequence[str | Mapping[str, Any]]) -> list[tuple[str, float, Reward]]:
    """Returns (name, weight, reward) of each.

    Args:
      specs: names of REGISTRY or import paths of factories ('pkg.mod:factory'), or {"name": such, "weight": 1.0,
        "as": the name that is logged, options...}.

    Raises:
      UserError: none given, an unknown name or option, a value of another kind.
    """
    if not specs:
        raise UserError(f"objective.rewards is empty; allowed: {', '.join(REGISTRY)}, or an import path.")
    out = []
    for given in read_specs(specs):
        name, weight, shown = (given.pop(key) for key in ("name", "weight", "as"))
        if ":" not in name and name not in REGISTRY:
            raise UserError(
                f"objective.rewards has {name!r}{nearest(name, REGISTRY)}; allowed: {', '.join(REGISTRY)}, "
                "or an import path (package.module:factory)."
            )
        factory = import_path(name) if ":" in name else REGISTRY[name]
        allowed = inspect.signature(factory).parameters
        for key in given:
            if key not in allowed:
                raise UserError(
                    f"reward {name} has no option {key!r}{nearest(key, allowed)}; it takes: "
                    f"{', '.join(allowed) or 'none'}, and weight."
                )
        missing = [key for key, p in allowed.items() if p.default is p.empty and key not in given]
        if missing:
            raise UserError(f"reward {name} needs the option {missing[0]!r}.")
        for key, value in given.items():
            kind, needed = _KINDS.get(allowed[key].annotation, (object, ""))
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise UserError(f"reward {name}: {key} is {value!r}; {needed} is needed.")
        out.append((shown, weight, factory(**given)))
    return out
