"""Which docstring is it? A piece of Python's library, its docstring's first paragraph and three of others."""

import hashlib
from collections.abc import Callable, Iterable, Iterator

from gpt_jax.tasks import python_docstrings
from gpt_jax.tasks.base import MultipleChoice, Task, TextToText


def task(size: int = 3000, choices: int = 4, longest_code: int = 300, longest_docstring: int = 100) -> Task:
    """Embedded: nothing is downloaded. The others are docstrings of the next pieces of the same split.

    Args:
      size: pieces in all. choices: of an example. longest_code, longest_docstring: in characters.
    """
    limits = dict(longest_code=longest_code, longest_docstring=longest_docstring)
    pairs = python_docstrings.task(size=size, template="{code}\n", **limits)
    return Task(
        name="python_choices",
        kind="multiple_choice",
        metrics=("accuracy",),
        splits={name: _with_others(read, choices) for name, read in pairs.splits.items()},
    )


def _with_others(read: Callable[[], Iterable[TextToText]], choices: int) -> Callable[[], Iterator[MultipleChoice]]:
    def examples() -> Iterator[MultipleChoice]:
        pairs = list(read())
        for number, pair in enumerate(pairs):
            others: list[str] = []
            for other in [*pairs[number + 1 :], *pairs[:number]]:
                if len(others) == choices - 1:
                    break
                if other.target not in (pair.target, *others):
                    others.append(other.target)
            answer = hashlib.blake2b(pair.source.encode(), digest_size=4).digest()[0] % (len(others) + 1)
            shown = (*others[:answer], pair.target, *others[answer:])
            yield MultipleChoice(pair.source, shown, answer, where=pair.where)

    return examples
