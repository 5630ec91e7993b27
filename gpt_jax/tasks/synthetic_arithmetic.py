"""Arithmetic in GPT-3's format (Brown et al. 2020, 3.9.1): 'Q: What is 48 plus 76?', 'A:', the sum."""

from collections.abc import Iterator

import numpy as np

from gpt_jax.data.permutation import permute
from gpt_jax.errors import UserError, choose
from gpt_jax.tasks.base import Task, TextToText
from gpt_jax.tasks.python_library import SHARES, split_of

OPERATIONS = {"plus": lambda a, b: a + b, "minus": lambda a, b: a - b, "times": lambda a, b: a * b}
MOST = 100_000


def task(digits: int = 2, operation: str = "plus", size: int = 0, seed: int = 0) -> Task:
    """Made up: nothing is downloaded. Both numbers are uniform on [0, 10^digits), no problem comes twice.

    Problems with the same two numbers, whatever their order, are in one split.

    Args:
      digits: of each number, at most. operation: plus, minus or times. size: problems in all; 0 is every one there is,
        at most 100,000. seed: of the order.
    """
    choose("task synthetic_arithmetic: operation", operation, OPERATIONS)
    if not 1 <= digits <= 8:
        raise UserError(f"task synthetic_arithmetic: digits is {digits}; allowed: 1 to 8.")
    base = 10**digits
    count = min(size or MOST, base * base)

    def examples(split: str) -> Iterator[TextToText]:
        for start in range(0, count, 1024):
            numbers = permute(np.arange(start, min(start + 1024, count)), base * base, seed)
            for number in numbers.tolist():
                a, b = divmod(number, base)
                if split_of(f"{min(a, b)} {operation} {max(a, b)}") == split:
                    source = f"Q: What is {a} {operation} {b}?\n\nA:"
                    yield TextToText(source, f" {OPERATIONS[operation](a, b)}", where=f"{a} {operation} {b}")

    return Task(
        name="synthetic_arithmetic",
        kind="text_to_text",
        metrics=("accuracy",),
        splits={split: lambda split=split: examples(split) for split in SHARES},
    )


def solve(question: str) -> str | None:
    """Returns the answer to a question of this format, without the space before it, or None if it is no such question.

    The last question counts: there may be solved ones before it.
    """
    words = question.rpartition("What is")[2].partition("?")[0].split()
    if len(words) != 3 or words[1] not in OPERATIONS:
        return None
    if not all(word.lstrip("-").isdecimal() for word in (words[0], words[2])):
        return None
    return str(OPERATIONS[words[1]](int(words[0]), int(words[2])))
