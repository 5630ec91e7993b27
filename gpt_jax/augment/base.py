"""What generators give, and how it is kept: no duplicates, nothing of the test set, exactly so many per class."""

from __future__ import annotations

import collections
import dataclasses
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from gpt_jax.errors import UserError

PATIENCE = 5  # rounds without a new example of a class that is short before generation ends


class Synthetic(NamedTuple):
    """A synthetic example.

    Attributes:
      label, text: of it. score: larger is better; of filters, else of the generator. parent: index of the original it
        was made of, -1 if of none.
    """

    label: str
    text: str
    score: float = 0.0
    parent: int = -1


class Generator(Protocol):
    """Makes synthetic examples; `copies` says that equality with an original is the point."""

    name: str
    copies: bool

    def augment(self, train: Sequence[Any], rng: random.Random) -> list[Synthetic]:
        """Returns new examples made of the originals (`gpt_jax.tasks.Classify`); more at every call."""


class Filter(Protocol):
    """Scores candidates anew and leaves some out."""

    name: str

    def keep(self, candidates: Sequence[Synthetic]) -> list[Synthetic]:
        """Returns those kept, their scores multiplied by the filter's own."""


@dataclasses.dataclass
class Counts:
    """What became of the candidates: generated = duplicates + overlaps + filtered + left + selected."""

    generated: int = 0
    duplicates: int = 0
    overlaps: int = 0
    filtered: int = 0
    left: int = 0
    selected: int = 0
    rounds: int = 0


def normalise(text: str) -> str:
    """A text without case, punctuation and extra space: what counts as the same."""
    return " ".join(re.findall(r"\w+", text.lower()))


def select(
    candidates: Sequence[Synthetic], per_class: Mapping[str, int], by_score: bool = True, exact: bool = True
) -> list[Synthetic]:
    """Returns exactly so many of each class: those of the best scores, or the first ones; not `exact`, so many at most.

    Raises:
      UserError: a class has too few; not `exact`, none is left of any.
    """
    out = []
    for label, count in per_class.items():
        own = [c for c in candidates if c.label == label]
        if exact and len(own) < count:
            raise UserError(
                f"{len(own)} synthetic examples of class {label!r} are left of the candidates, {count} are wanted: "
                "ask for fewer (--count), filter less or generate more (--oversample)."
            )
        out += sorted(own, key=lambda c: -c.score)[:count] if by_score else own[:count]
    if not out:
        raise UserError("no synthetic example is left of the candidates: filter less or generate more.")
    return out


def augment_task(
    train: Sequence[Any],
    generator: Generator,
    *,
    per_class: Mapping[str, int],
    rng: random.Random,
    filters: Sequence[Filter] = (),
    refused: Iterable[str] = (),
    oversample: int = 1,
    exact: bool = True,
) -> tuple[list[Synthetic], Counts]:
    """Generates, filters and selects synthetic examples.

    Args:
      train: originals. generator: see `Generator`. per_class: how many of each label. rng: of all draws.
      filters: applied in turn. refused: texts that no example may equal: those of the validation and test sets.
      oversample: candidates of each class before the best are taken (without filters the first), in multiples of
        `per_class`.
      exact: a class that stays short is an error; else it has fewer.

    Returns:
      (examples, counts). No two examples have the same text, none that of an original (unless the generator copies),
      none that of a refused one, all but for case, punctuation and space.

    Raises:
      UserError: a class stays short, although some rounds gave nothing new of one (not `exact`: all of them empty).
    """
    seen = set() if generator.copies else {normalise(example.text) for example in train}
    closed = {normalise(text) for text in refused}
    counts, kept, idle = Counts(), [], 0
    short = set(per_class)
    while idle < PATIENCE:
        counts.rounds += 1
        found = []
        for candidate in generator.augment(train, rng):
            key = normalise(candidate.text)
            counts.generated += 1
            if key in closed:
                counts.overlaps += 1
            elif not key or (key in seen and not generator.copies) or candidate.label not in per_class:
                counts.duplicates += 1
            else:
                seen.add(key)
                found.append(candidate)
        before = len(found)
        if filters:  # the generator's own score is of another kind
            found = [c._replace(score=1.0) for c in found]
        for one in filters:
            found = one.keep(found)
        counts.filtered += before - len(found)
        kept += found
        idle = 0 if any(c.label in short for c in found) else idle + 1
        have = collections.Counter(c.label for c in kept)
        short = {label for label, count in per_class.items() if have[label] < oversample * count}
        if not short:
            break
    chosen = select(kept, per_class, by_score=bool(filters), exact=exact)
    counts.selected, counts.left = len(chosen), len(kept) - len(chosen)
    return chosen, counts


def per_label(labels: Sequence[str], count: int) -> dict[str, int]:
    """So many of each label."""
    if count < 1:
        raise UserError(f"--count is {count}; at least 1 synthetic example per class is needed.")
    return dict.fromkeys(labels, count)


def as_rows(examples: Sequence[Synthetic], provenance: Mapping[str, Any], train: Sequence[Any]) -> list[dict]:
    """Returns JSON-able rows: label, text, score and where each comes from."""
    rows = []
    for example in examples:
        made_of = {"parent": train[example.parent].where} if example.parent >= 0 else {}
        rows.append(
            {
                "label": example.label,
                "text": example.text,
                "score": round(float(example.score), 6),
                "provenance": {**provenance, **made_of},
            }
        )
    return rows
