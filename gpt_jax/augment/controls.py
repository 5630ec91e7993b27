"""The controls: copies of the originals, and easy data augmentation (EDA, Wei and Zou 2019).

EDA replaces words by WordNet's synonyms. Nothing is downloaded here: a word's neighbours are those that stand in the
same surroundings in a corpus, the nearest by the cosine of positive pointwise mutual information with the words around.
They are of its kind ('good': 'bad', 'great') more than of its meaning.
"""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpt_jax.augment.base import Synthetic

_STOP_WORDS = """
a an the and or but if of at by for with about into to from in on off over under is am are was were be been being
do does did have has had i me my we our you your he him his she her it its they them their this that these those
as not no so than too very can will just all any both each more most other some such only own same s t
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


@dataclasses.dataclass(frozen=True)
class Copy:
    """The null control: each original, over and over."""

    name: str = "copy"
    copies: bool = True

    def augment(self, train: Sequence[Any], rng: random.Random) -> list[Synthetic]:
        order = rng.sample(range(len(train)), len(train))
        return [Synthetic(train[i].label, train[i].text, 1.0, i) for i in order]


@dataclasses.dataclass(frozen=True)
class EDA:
    """Random replacement by a neighbour, insertion of one, swaps and deletions of words: a quarter of the texts each.

    Attributes:
      neighbours: of words, best first. alpha: part of a text's words changed (one at least), and probability of a
        deletion. per_example: texts made of each original at a call. Wei and Zou's: .05 and 16 at 500 examples.
    """

    neighbours: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    alpha: float = 0.05
    per_example: int = 16
    name: str = "eda"
    copies: bool = False

    def augment(self, train: Sequence[Any], rng: random.Random) -> list[Synthetic]:
        ways = (self._replace, self._insert, self._swap, self._delete)
        out = []
        for turn in range(self.per_example):  # all originals before any of them again: a cut-off takes of each alike
            for i, example in enumerate(train):
                words = example.text.split()
                n = max(1, round(self.alpha * len(words)))
                changed = ways[turn % len(ways)](words, n, rng)
                if changed != example.text.split():
                    out.append(Synthetic(example.label, " ".join(changed), 1.0, i))
        return out

    def _known(self, words: Sequence[str]) -> list[int]:
        return [i for i, word in enumerate(words) if word.lower() in self.neighbours]

    def _replace(self, words: list[str], n: int, rng: random.Random) -> list[str]:
        known = self._known(words)
        for at in rng.sample(known, min(n, len(known))):
            words[at] = rng.choice(self.neighbours[words[at].lower()])
        return words

    def _insert(self, words: list[str], n: int, rng: random.Random) -> list[str]:
        for _ in range(n):
            if known := self._known(words):
                new = rng.choice(self.neighbours[words[rng.choice(known)].lower()])
                words.insert(rng.randint(0, len(words)), new)
        return words

    def _swap(self, words: list[str], n: int, rng: random.Random) -> list[str]:
        for _ in range(n if len(words) > 1 else 0):
            i, j = rng.sample(range(len(words)), 2)
            words[i], words[j] = words[j], words[i]
        return words

    def _delete(self, words: list[str], n: int, rng: random.Random) -> list[str]:
        kept = [word for word in words if rng.random() >= self.alpha]
        if len(kept) == len(words) > 1:
            del kept[rng.randrange(len(kept))]
        return kept or [rng.choice(words)]


def distributional_neighbours(
    texts: Iterable[str], *, words: int = 5000, contexts: int = 500, window: int = 2, nearest: int = 8
) -> dict[str, list[str]]:
    """Returns the nearest words of the frequent words of a corpus, stop words left out.

    Args:
      texts: of the corpus. words: the most frequent ones that get neighbours. contexts: the most frequent ones counted
        around them. window: words to each side. nearest: neighbours of each.
    """
    tokens = [[w for w in text.lower().split() if any(map(str.isalpha, w))] for text in texts]
    frequent = collections.Counter(w for text in tokens for w in text)
    rows = [w for w, count in frequent.most_common() if count > 1 and w not in STOP_WORDS][:words]
    columns = [w for w, _ in frequent.most_common(contexts)]
    row_of, column_of = ({w: i for i, w in enumerate(names)} for names in (rows, columns))
    counts = np.zeros((len(rows), len(columns)), np.float32)
    for text in tokens:
        for i, word in enumerate(text):
            if word in row_of:
                for other in (*text[max(0, i - window) : i], *text[i + 1 : i + 1 + window]):
                    if other in column_of:
                        counts[row_of[word], column_of[other]] += 1
    total = counts.sum()
    if total == 0:
        return {}
    expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / total
    with np.errstate(divide="ignore", invalid="ignore"):
        ppmi = np.nan_to_num(np.maximum(np.log(counts / expected), 0.0), posinf=0.0, neginf=0.0)
    norms = np.linalg.norm(ppmi, axis=1, keepdims=True)
    unit = ppmi / np.where(norms > 0, norms, 1.0)
    out = {}
    for start in range(0, len(rows), 512):
        close = unit[start : start + 512] @ unit.T
        close[np.arange(len(close)), start + np.arange(len(close))] = -1.0
        best = np.argsort(-close, axis=1)[:, :nearest]
        for i, places in enumerate(best):
            found = [rows[j] for j in places.tolist() if close[i, j] > 0]
            if found:
                out[rows[start + i]] = found
    return out
