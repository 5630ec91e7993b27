"""Fitting a text into a budget of tokens: cut it on one side, in the middle, or read it in windows and pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpt_jax.errors import UserError, choose

POLICIES = ("left", "right", "head_tail")


def truncate(ids: Sequence[int], budget: int, policy: str, head: float = 0.5) -> list[int]:
    """Returns at most `budget` of the ids, in their order.

    Args:
      policy: 'left' drops the beginning, 'right' the end, 'head_tail' the middle.
      head: head_tail: the part of the budget that the beginning gets (rounded; Sun et al. 2019 take 1/4).

    Raises:
      UserError: an unknown policy, a negative budget, a head outside [0, 1].
    """
    choose("the truncation policy", policy, POLICIES)
    ids = [int(i) for i in ids]
    if budget < 0:
        raise UserError(f"the budget is {budget} tokens; it must be 0 or more.")
    if not 0 <= head <= 1:
        raise UserError(f"head is {head}; it must be in [0, 1].")
    over = len(ids) - budget
    if over <= 0:
        return ids
    first = {"left": 0, "right": budget, "head_tail": round(budget * head)}[policy]
    return ids[:first] + ids[first + over :]


def split_windows(ids: Sequence[int], budget: int, stride: int = 0) -> list[list[int]]:
    """Cuts ids into windows of `budget` that advance by `stride` (0: by budget) and cover them; the last is full too.

    An empty text is one empty window.
    """
    stride = stride or budget
    if not 1 <= stride <= budget:
        raise UserError(f"stride is {stride}; it must be at least 1 and at most the budget, {budget}.")
    ids = [int(i) for i in ids]
    if len(ids) <= budget:
        return [ids]
    starts = [*range(0, len(ids) - budget, stride), len(ids) - budget]
    return [ids[start : start + budget] for start in starts]


def max_pool(
    score: Callable[[list[list[int]]], Any], texts: Sequence[Sequence[int]], budget: int, stride: int = 0
) -> np.ndarray:
    """Scores texts of any length: the largest score over the windows of each, entry by entry.

    Args:
      score: windows -> their scores [windows, ...]; called once with those of all texts.

    Returns:
      [texts, ...].

    Raises:
      UserError: no texts.
    """
    if not len(texts):
        raise UserError("there are no texts to score; at least 1 is needed.")
    parts = [split_windows(text, budget, stride) for text in texts]
    scores = np.asarray(score([window for part in parts for window in part]))
    ends = np.cumsum([len(part) for part in parts])
    return np.stack([scores[end - len(part) : end].max(axis=0) for part, end in zip(parts, ends, strict=True)])
