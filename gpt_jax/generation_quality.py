"""How the texts of each decoding method compare with human ones: variety, repetition, perplexity, copying.

Prompts are pieces of the validation text, and the human continuation of each is what stood there (Holtzman et al. 2020:
a method whose figures are far from the human ones, on either side, generates unlike a human). Every figure has an
interval over texts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpt_jax.data.baselines import documents
from gpt_jax.errors import UserError, choose
from gpt_jax.generation import generate
from gpt_jax.predictions import spread
from gpt_jax.score import Scorer, split_pair
from gpt_jax.text_quality import bootstrap, copied_counts, ngrams, self_bleu_scores, seq_rep_n

# The settings of `generate`, of `beam_search` where there are beams, of `contrastive_search` where there is a k.
METHODS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "beam_4": {"beams": 4, "alpha": 0.6},
    "sample": {"temperature": 1.0},
    "temperature_0.7": {"temperature": 0.7},
    "top_k_40": {"temperature": 1.0, "top_k": 40},
    "top_p_0.95": {"temperature": 1.0, "top_p": 0.95},
    "min_p_0.1": {"temperature": 1.0, "min_p": 0.1},
    "contrastive_4": {"k": 4, "alpha": 0.6},
    "repetition_1.2": {"temperature": 1.0, "repetition_penalty": 1.2},
}
_TRIED = 20  # places looked at for each prompt
COPIED = 8  # words of an n-gram that counts as copied


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Token ids of prompts and of what human text has after them."""

    prompts: list[list[int]]
    continuations: list[list[int]]


def human_prompts(splits: Sequence[Any], count: int, prompt: int, new: int) -> Prompts:
    """Cuts prompts and their continuations out of validation text, spread over all of it, each within one document.

    Args:
      splits: of a store. count: of prompts. prompt, new: tokens of each and of its continuation.

    Raises:
      UserError: the documents are too short or too few.
    """
    for name, value in (("texts", count), ("prompt tokens", prompt), ("new tokens", new)):
        if value < 1:
            raise UserError(f"{name}: {value}; at least 1 is needed.")
    if count < 2:
        raise UserError(f"texts: {count}; at least 2 are needed, to compare them with each other.")
    total = sum(split.num_tokens for split in splits)
    found: list[list[int]] = []
    for split in splits:
        wanted = max(1, round(count * split.num_tokens / max(1, total)))
        room = split.num_tokens - prompt - new
        starts = range(0, max(0, room + 1), prompt + new)
        starts, fitting = [starts[i] for i in spread(len(starts), _TRIED * wanted)], []
        for start in starts:
            ids = split.read(start, prompt + new)
            if split.eot is None or not (ids == split.eot).any():
                fitting.append(ids.tolist())
        found += [fitting[i] for i in spread(len(fitting), wanted)]
    if len(found) < 2:
        raise UserError(
            f"the validation text has {len(found)} pieces of {prompt + new} tokens within one document; at least two "
            "are needed: ask for fewer prompt or new tokens."
        )
    found = found[:count]
    return Prompts([ids[:prompt] for ids in found], [ids[prompt:] for ids in found])


def evaluate_generation(
    scorer: Scorer,
    given: Prompts,
    training_texts: Iterable[str],
    *,
    methods: Sequence[str] = tuple(METHODS),
    seed: int = 0,
    reference: Scorer | None = None,
    say: Callable[[str, Mapping[str, Any]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Generates with each method and measures its texts and the human ones.

    Args:
      scorer: of the model that generates. given: see `human_prompts`. training_texts: read once.
      methods: names in METHODS. seed: of the first text; the next ones follow.
      reference: whose perplexity is measured; None: the model's own.
      say: takes (method, its figures) as they come.

    Returns:
      {"human" or method: {metric: value, metric_low, metric_high: its 95% interval}}: distinct_1 to 3, self_bleu_4,
      seq_rep_4 (of tokens), perplexity (per token of the reference), copy_rate (share of 8-grams of words that occur in
      training texts), tokens (mean length).
    """
    for name in methods:
        choose("method", name, METHODS)
    texts: dict[str, list[list[int]]] = {"human": given.continuations}
    most = max(map(len, given.continuations))
    for name in methods:
        texts[name] = _generate(scorer, given.prompts, most, METHODS[name], seed)
    decode = scorer.tokenizer.decode
    as_text = {name: [decode(ids) for ids in rows] for name, rows in texts.items()}
    # One pass over the training texts serves all methods.
    copied, of = copied_counts([text for rows in as_text.values() for text in rows], training_texts, COPIED)
    out: dict[str, dict[str, Any]] = {}
    at, before = 0, [decode(ids) for ids in given.prompts]
    for name, rows in as_text.items():
        counts = np.array([copied[at : at + len(rows)], of[at : at + len(rows)]], np.float64)
        at += len(rows)
        losses = _own_losses(scorer, given.prompts, texts[name])
        if reference is not None:
            losses = _losses(reference, before, rows)
        out[name] = measure(texts[name], rows, losses, counts)
        if say is not None:
            say(name, out[name])
    return out


def measure(
    ids: Sequence[Sequence[int]], texts: Sequence[str], losses_Nx2: np.ndarray, copied_2xN: np.ndarray
) -> dict[str, float]:
    """Figures of one method's texts with their intervals.

    Args:
      ids, texts: the same. losses_Nx2: (nats, tokens) of each under the reference. copied_2xN: (copied, all) n-grams.
    """
    n = len(texts)
    out: dict[str, float] = {}

    def put(name: str, value: float, low: float, high: float) -> None:
        out[name], out[f"{name}_low"], out[f"{name}_high"] = value, low, high

    for order in (1, 2, 3):
        put(f"distinct_{order}", *_distinct(texts, order))
    for name, values in (
        ("self_bleu_4", self_bleu_scores(texts, 4)),
        ("seq_rep_4", [value for row in ids if (value := seq_rep_n(row, 4)) is not None] or [0.0]),
        ("tokens", list(map(len, ids))),
    ):
        each = np.asarray(values, np.float64)
        put(name, float(each.mean()), *bootstrap(lambda rows, each=each: each[rows].mean(), len(each)))

    def perplexity(rows: np.ndarray) -> float:
        nats, tokens = losses_Nx2[rows].sum(axis=0)
        return math.exp(min(nats / max(tokens, 1), 700.0))

    def rate(rows: np.ndarray) -> float:
        hits, number = copied_2xN[:, rows].sum(axis=1)
        return hits / number if number else 0.0

    everything = np.arange(n)
    put("perplexity", perplexity(everything), *bootstrap(perplexity, n))
    put("copy_rate", rate(everything), *bootstrap(rate, n))
    return out


def _distinct(texts: Sequence[str], order: int) -> tuple[float, float, float]:
    """Distinct-n and its interval by the jackknife: a bootstrap would draw texts twice and so find fewer n-grams."""
    rows = [ngrams(text.split(), order) for text in texts]
    owners: dict[tuple, int] = {}  # the one text that has it, -1 where several do
    for number, grams in enumerate(rows):
        for gram in grams:
            owners[gram] = number if owners.get(gram, number) == number else -1
    total, different = sum(map(len, rows)), len(owners)
    own = np.zeros(len(rows))
    for owner in owners.values():
        if owner >= 0:
            own[owner] += 1
    value = different / total if total else 0.0
    rest = np.array([total - len(grams) for grams in rows], np.float64)
    without = (different - own) / np.maximum(rest, 1)
    half = 1.96 * math.sqrt((len(rows) - 1) / len(rows) * float(((without - without.mean()) ** 2).sum()))
    return value, max(0.0, value - half), min(1.0, value + half)


def _generate(
    scorer: Scorer, prompts: Sequence[Sequence[int]], new: int, settings: Mapping[str, Any], seed: int
) -> list[list[int]]:
    ids = [[*scorer.begin, *prompt] for prompt in prompts]
    if "beams" in settings:
        from gpt_jax.beam import beam_search

        found = beam_search(scorer.model, scorer.params, ids, max_tokens=new, eot=scorer.eot, **settings)
        return [hypotheses[0][0] for hypotheses in found]
    if "k" in settings:
        from gpt_jax.contrastive import contrastive_search

        return contrastive_search(scorer.model, scorer.params, ids, max_tokens=new, eot=scorer.eot, **settings)
    seeds = [seed + i for i in range(len(ids))]
    return generate(scorer.model, scorer.params, ids, max_tokens=new, eot=scorer.eot, seeds=seeds, **settings)


def _own_losses(scorer: Scorer, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> np.ndarray:
    """(nats, tokens) of each text, in the tokens it was generated in; 0 of an empty one."""
    return _summed(scorer, [([*scorer.begin, *p], list(t)) for p, t in zip(prompts, texts, strict=True)])


def _losses(reference: Scorer, before: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """(nats, tokens) of each text after its prompt under another model, which has a tokenizer of its own."""
    pairs = [split_pair(reference.tokenizer, b, t) if t else ([], []) for b, t in zip(before, texts, strict=True)]
    return _summed(reference, [([*reference.begin, *context], new) for context, new in pairs])


def _summed(scorer: Scorer, pairs: Sequence[tuple[list[int], list[int]]]) -> np.ndarray:
    out = np.zeros((len(pairs), 2))
    rows = [i for i, (_, new) in enumerate(pairs) if new]
    # What is longer than the model reads at once is scored up to there.
    scores = scorer.score_ids([(pairs[i][0], pairs[i][1][: scorer.max_length]) for i in rows])
    for i, score in zip(rows, scores, strict=True):
        out[i] = -score.total, score.tokens
    return out


def training_documents(splits: Mapping[str, Any], tokenizer: Any) -> Iterable[str]:
    """Yields the training texts of a prepared Data's splits."""
    train = [split for name, split in splits.items() if name.rpartition("/")[2] == "train"]
    return (data.decode("utf-8", errors="replace") for data in documents(train, tokenizer))
