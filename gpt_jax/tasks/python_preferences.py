"""Which docstring is better? One of Python's library, and the same one spoilt: words of it moved, lost or exchanged."""

import random
import zlib
from collections.abc import Callable, Iterable, Iterator

from gpt_jax.tasks import python_docstrings
from gpt_jax.tasks.base import Preference, Task, TextToText


def task(size: int = 3000, longest_code: int = 300, longest_docstring: int = 100, rate: float = 0.3) -> Task:
    """Embedded: nothing is downloaded. A synthetic preference: the labels are right by construction.

    Args:
      size: pairs in all. longest_code, longest_docstring: in characters. rate: part of the words that is spoilt.
    """
    pairs = python_docstrings.task(size=size, longest_code=longest_code, longest_docstring=longest_docstring)
    return Task(
        name="python_preferences",
        kind="preference",
        metrics=("accuracy",),
        splits={name: _with_spoilt(read, rate) for name, read in pairs.splits.items()},
    )


def _with_spoilt(read: Callable[[], Iterable[TextToText]], rate: float) -> Callable[[], Iterator[Preference]]:
    def examples() -> Iterator[Preference]:
        pairs = list(read())
        for number, pair in enumerate(pairs):
            rng = random.Random(zlib.crc32(pair.source.encode()))
            other = pairs[(number + 1) % len(pairs)].target.split()
            rejected = spoil(pair.target, other, rate, rng)
            if rejected != pair.target:
                yield Preference(pair.source, pair.target, rejected, where=pair.where)

    return examples


def spoil(text: str, other: list[str], rate: float, rng: random.Random) -> str:
    """Returns the text with about `rate` of its words (one at least) moved by one place, left out or replaced by one
    of `other`."""
    words = text.split()
    for at in sorted(rng.sample(range(len(words)), max(1, round(rate * len(words)))), reverse=True):
        way = rng.randrange(3)
        if way == 0 and at + 1 < len(words):
            words[at : at + 2] = words[at : at + 2][::-1]
        elif way == 1 and len(words) > 1:
            del words[at]
        else:
            words[at] = rng.choice(other)
    return " ".join(words)
