"""Passkey retrieval (Mohtashami and Jaggi 2023): a number hidden in dull text, asked for at its end.

The question is put at every depth of the number and every length of the text. The key's tokens are read off one forward
pass: the model would say the key greedily just if the most likely token is right at each of them.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.context.perplexity import check_length
from gpt_jax.errors import UserError
from gpt_jax.model import Transformer

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "What is the pass key? The pass key is"
DIGITS = 5


def documents(count: int, lengths: tuple[int, int], seed: int = 0) -> Iterator[str]:
    """Yields texts that teach the task: filler, needle, filler, question and answer, between two lengths in bytes."""
    rng = random.Random(seed)
    for _ in range(count):
        key = f"{rng.randrange(10**DIGITS):0{DIGITS}d}"
        fixed = len(NEEDLE.format(key=key)) + len(QUESTION) + DIGITS + 3
        room = max(0, rng.randint(*lengths) - fixed)
        before = rng.randint(0, room)
        text = FILLER * (room // len(FILLER) + 1)
        yield f"{text[:before]}{NEEDLE.format(key=key)}{text[: room - before]}{QUESTION} {key}.\n"


def shortest(tokenizer: Any) -> int:
    """Tokens of a text without filler."""
    fixed = (tokenizer.encode(t).tolist() for t in (NEEDLE.format(key="0" * DIGITS), QUESTION))
    return len(tokenizer.begin) + sum(map(len, fixed))


def prompt(tokenizer: Any, key: str, length: int, depth: float) -> tuple[list[int], list[int]]:
    """Returns (ids of a text of exactly `length` tokens that ends with the question, ids of the answer).

    Args:
      depth: part of the filler that stands before the needle, 0 to 1.

    Raises:
      UserError: the length leaves no room for the needle and the question.
    """
    needle, question = (tokenizer.encode(t).tolist() for t in (NEEDLE.format(key=key), QUESTION))
    room = length - len(tokenizer.begin) - len(needle) - len(question)
    if room < 0:
        raise UserError(f"a passkey text of {length} tokens has no room for {length - room} of needle and question.")
    filler = tokenizer.encode(FILLER).tolist()
    filler = (filler * (room // len(filler) + 1))[:room]
    before = round(depth * room)
    ids = [*tokenizer.begin, *filler[:before], *needle, *filler[before:], *question]
    return ids, tokenizer.encode(f" {key}").tolist()


@functools.partial(jax.jit, static_argnums=(0, 3))
def _right(model: Transformer, params: Any, tokens_BxT: Array, answer: int) -> Array:
    """Whether the most likely token is right at each of the last `answer` tokens, [B, answer]."""
    hidden, _ = model.apply({"params": params}, tokens_BxT[:, :-1], method="encode")
    logits = model.apply({"params": params}, hidden[:, -answer:], method="unembed")
    return jnp.argmax(logits, axis=-1) == tokens_BxT[:, -answer:]


def retrieval(
    model: Transformer,
    params: Any,
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy by depth and length.

    Args:
      lengths: tokens of the text. depths: 0 (first) to 1 (last). trials: keys per cell.

    Returns:
      {'lengths', 'depths', 'trials', 'exact': [depths][lengths] part of the keys that come out whole, 'tokens': part of
      their tokens that are right given those before}.
    """
    for length in lengths:
        check_length(model, length)
    exact, parts = np.zeros((len(depths), len(lengths))), np.zeros((len(depths), len(lengths)))
    for column, length in enumerate(lengths):
        for row, depth in enumerate(depths):
            rng = random.Random(f"{seed} {length} {depth}")
            groups: dict[int, list[list[int]]] = {}  # by tokens of the answer
            for _ in range(trials):
                ids, answer = prompt(tokenizer, f"{rng.randrange(10**DIGITS):0{DIGITS}d}", length, depth)
                groups.setdefault(len(answer), []).append(ids + answer)
            for answer, rows in groups.items():
                check_length(model, length + answer - 1)
                padded = np.asarray(rows + rows[:1] * (trials - len(rows)), np.int32)
                right = np.asarray(_right(model, params, padded, answer))[: len(rows)]
                exact[row, column] += right.all(axis=1).sum()
                parts[row, column] += right.mean(axis=1).sum()
    return {
        "lengths": list(map(int, lengths)),
        "depths": list(map(float, depths)),
        "trials": trials,
        "exact": (exact / trials).tolist(),
        "tokens": (parts / trials).tolist(),
    }
