"""How varied, repetitive and original generated texts are: distinct-n, self-BLEU, seq-rep-n, copy rate.

Words are what white space separates. None of these knows whether a text is good: they are read beside the same figures
of human text (Holtzman et al. 2020), which no method of decoding should lie far from.
"""

from __future__ import annotations

import bisect
import collections
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gpt_jax.errors import UserError

Texts = Sequence[str]


def ngrams(words: Sequence, n: int) -> list[tuple]:
    """Returns all len(words) - n + 1 n-grams in order."""
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct_n(texts: Texts, n: int) -> float:
    """Different n-grams of all texts over their number (Li et al. 2016); 0 if there is none."""
    grams = [gram for text in texts for gram in ngrams(text.split(), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def seq_rep_n(tokens: Sequence, n: int = 4) -> float | None:
    """1 - different / all n-grams of one sequence (Welleck et al. 2020), the last n-gram included.

    Args:
      tokens: token ids, or words. n: length of the n-grams.

    Returns:
      0 (all differ) to nearly 1; None for a sequence shorter than n, which has none.
    """
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else None


def mean_seq_rep_n(sequences: Iterable[Sequence], n: int = 4) -> float:
    """Mean of `seq_rep_n` over sequences; those without an n-gram are left out, 0 if all are."""
    found = [value for sequence in sequences if (value := seq_rep_n(sequence, n)) is not None]
    return sum(found) / len(found) if found else 0.0


def self_bleu(texts: Texts, n: int = 4) -> float:
    """Mean BLEU-n of each text against all others (Zhu et al. 2018); identical texts give 1.

    Orders without a match count 0.1 (Chen and Cherry's method 1). Each n-gram keeps its two largest counts among the
    texts, so that the time is linear in the texts; NLTK's own loop over all pairs gives the same numbers.

    Raises:
      UserError: fewer than two texts.
    """
    scores = self_bleu_scores(texts, n)
    return sum(scores) / len(scores)


def self_bleu_scores(texts: Texts, n: int = 4) -> list[float]:
    """Returns the BLEU-n of each text against all others: see `self_bleu`."""
    if len(texts) < 2:
        raise UserError(f"self_bleu_{n} compares texts with each other: at least two are needed.")
    words = [text.split() for text in texts]
    best: list[dict[tuple, list[tuple[int, int]]]] = [{} for _ in range(n)]  # (count, text), the largest two
    for number, text in enumerate(words):
        for order in range(n):
            for gram, count in collections.Counter(ngrams(text, order + 1)).items():
                best[order][gram] = sorted([*best[order].get(gram, []), (count, number)], reverse=True)[:2]
    lengths = sorted(map(len, words))
    return [_bleu_among(text, number, best, lengths) for number, text in enumerate(words)]


def _bleu_among(text: list[str], number: int, best: list[dict], lengths: list[int]) -> float:
    log_precision = 0.0
    for order, owners in enumerate(best):
        counts = collections.Counter(ngrams(text, order + 1))
        clipped = 0
        for gram, count in counts.items():
            clipped += min(count, max((c for c, owner in owners[gram] if owner != number), default=0))
        if order == 0 and clipped == 0:
            return 0.0
        log_precision += math.log((clipped or 0.1) / max(1, counts.total())) / len(best)
    others = list(lengths)
    others.pop(bisect.bisect_left(others, len(text)))
    at = bisect.bisect_left(others, len(text))
    closest = min(others[max(0, at - 1) : at + 1], key=lambda length: (abs(length - len(text)), length))
    return math.exp(min(0.0, 1 - closest / len(text)) + log_precision)


def copy_rate(texts: Texts, training_texts: Iterable[str], n: int = 0) -> float:
    """How much of the texts is copied from the training set.

    Args:
      texts: generated texts. training_texts: read once; their n-grams are never all in memory.
      n: 0 is the share of texts that equal a training text but for case and white space; n > 0 the share of all their
        n-grams of words that occur in a training text.

    Returns:
      0 to 1; 0 if there is no text, or none with an n-gram.
    """
    copied, all_of_them = copied_counts(texts, training_texts, n)
    return sum(copied) / sum(all_of_them) if sum(all_of_them) else 0.0


def copied_counts(texts: Texts, training_texts: Iterable[str], n: int = 0) -> tuple[list[int], list[int]]:
    """Returns (copied, all) per text, of texts (n = 0: 0 or 1 of 1) or of n-grams: see `copy_rate`."""
    if n < 0:
        raise UserError(f"copy_rate's n is {n}; 0 compares whole texts, 1 or more n-grams.")

    def units(text: str) -> list:
        words = text.lower().split()
        return ngrams(words, n) if n else [tuple(words)]

    ours = [units(text) for text in texts]
    wanted = {unit for found in ours for unit in found}
    seen = set()
    for text in training_texts:
        seen.update(wanted.intersection(units(text)))
    return [sum(unit in seen for unit in found) for found in ours], [len(found) for found in ours]


def bootstrap(
    statistic: Callable[[np.ndarray], float], count: int, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of a statistic of `count` items.

    Args:
      statistic: of an array of indices of items, drawn with replacement. level: how often the interval should hold.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, count, count)) for _ in range(resamples)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
