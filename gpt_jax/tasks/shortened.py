"""Another task with its inputs cut to a budget of tokens: what a limited context costs, by what is kept of a text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from gpt_jax.context.truncation import POLICIES, truncate
from gpt_jax.data.readers import expand_variables
from gpt_jax.data.tokenizer import Tokenizer, load_tokenizer
from gpt_jax.errors import UserError, choose
from gpt_jax.tasks.base import Example, Malformed, SpanQA, Split, Task, TextToText, load_task

_BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True)
class ShortenedQA(SpanQA):
    """A question to a part of its context, which may have lost the answer; it is scored by it all the same."""

    expected: tuple[str, ...] = ()

    def problem(self, labels: Any) -> str:
        return "" if self.context.strip() else "nothing is left of the context"

    @property
    def gold(self) -> tuple[str, ...]:
        return self.expected


def task(
    task: str | Mapping[str, Any], tokenizer: str, budget: int, policy: str = "right", head: float = 0.5, end: str = ""
) -> Task:
    """The examples of a task whose input (the text, source or context) has at most `budget` tokens (whole characters).

    Args:
      task: the other task, a name or a table. tokenizer: the folder of one, as in a run's workdir.
      budget, policy, head: see `gpt_jax.context.truncation.truncate`.
      end: what is not cut: the source from its last occurrence on, e.g. the template's last words.

    Raises:
      UserError: a task of another kind than classify, text_to_text and span_qa; no tokenizer there.
    """
    whole = load_task(task)
    choose(f"task shortened: the kind of {whole.name}", whole.kind, ("classify", "text_to_text", "span_qa"))
    choose("task shortened: policy", policy, POLICIES)
    if budget < 1:
        raise UserError(f"task shortened: budget is {budget}; at least 1 token is needed.")
    tokens = load_tokenizer(expand_variables(tokenizer))
    cut = functools.partial(_cut, tokenizer=tokens, budget=budget, policy=policy, head=head, end=end)

    def read(split: Split) -> Split:
        return lambda: (item if isinstance(item, Malformed) else _shorten(item, cut) for item in _valid(split, whole))

    return dataclasses.replace(whole, splits={name: read(split) for name, split in whole.splits.items()}, skipped={})


def _valid(split: Split, whole: Task) -> Iterable[Example | Malformed]:
    """The examples as they are before they are cut; what is wrong with one is found here."""
    for item in split():
        problem = "" if isinstance(item, Malformed) else item.problem(whole.labels)
        yield Malformed(item.where, problem) if problem else item


def _cut(text: str, tokenizer: Tokenizer, budget: int, policy: str, head: float, end: str) -> str:
    body, mark, rest = text.rpartition(end) if end and end in text else (text, "", "")
    ids = tokenizer.encode(body)
    kept = np.array(truncate(range(len(ids)), budget, policy, head), np.int64)
    parts = np.split(kept, np.flatnonzero(np.diff(kept) > 1) + 1)
    decoded = [tokenizer.decode(ids[part]) for part in parts]
    if not tokenizer.lossless or not any(_BROKEN in text for text in decoded):
        return tokenizer.decode(ids[kept]) + mark + rest
    for i, part in enumerate(parts):  # a cut through a character leaves some of its bytes, which are none
        decoded[i] = decoded[i].lstrip(_BROKEN) if part[0] > 0 else decoded[i]
        decoded[i] = decoded[i].rstrip(_BROKEN) if part[-1] < len(ids) - 1 else decoded[i]
    return "".join(decoded) + mark + rest


def _shorten(item: Any, cut: Callable[[str], str]) -> Example:
    if isinstance(item, SpanQA):
        context = cut(item.context)
        kept = dict(where=item.where, group=item.group)
        answers = _moved(item.answers, item.context, context)
        return ShortenedQA(item.id, item.question, context, answers, expected=item.gold, **kept)
    if isinstance(item, TextToText):
        return dataclasses.replace(item, source=cut(item.source))
    return dataclasses.replace(item, text=cut(item.text))


def _moved(answers: Iterable[tuple[str, int]], whole: str, part: str) -> tuple[tuple[str, int], ...]:
    """The answers that lie in the beginning or the end that a text shares with a part of it, at their new places."""
    lost, head, tail = len(whole) - len(part), _shared(whole, part), _shared(whole[::-1], part[::-1])
    found = []
    for text, start in answers:
        if start + len(text) <= head:
            found.append((text, start))
        elif start >= len(whole) - tail:
            found.append((text, start - lost))
    return tuple(found)


def _shared(a: str, b: str) -> int:
    """How many characters two texts share from the beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
