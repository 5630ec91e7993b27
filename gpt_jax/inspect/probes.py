"""Linear probes with a control task: what can be read off the residual stream, and what the probe merely memorises.

For every layer a logistic regression learns the tag of a word from the stream at its last token. Beside it the same
probe learns a control: each word type has one tag drawn at random, by frequency. A probe that gets the control right
knows words by heart; selectivity, accuracy minus control accuracy, is what the layer itself says (Hewitt and Liang
2019). That something can be read off does not mean that the model uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.model.taps import Taps
from gpt_jax.tasks import Task


def probe_task(
    subject: Any, tokenizer: Any, task: Task, *, texts: int = 200, longest: int = 128, seed: int = 0
) -> dict[str, Any]:
    """Probes every layer for the tags of a task.

    Args:
      subject: see `forward.Subject`. task: of kind tag; trained on its split train, judged on valid.
      texts: read of each split, at most. longest: tokens of a text, without the words beyond. seed: of the control.

    Returns:
      accuracy, control, selectivity, each [L + 1], the embedding first; majority (accuracy of the most frequent tag);
      words (that were judged).

    Raises:
      UserError: a task of another kind, or one that has fewer than two tags among these words.
    """
    if task.kind != "tag":
        raise UserError(f"task {task.name} is of kind {task.kind!r}; a probe needs one of kind 'tag'.")
    found = [_streams(subject, tokenizer, task.examples(split)[:texts], longest) for split in ("train", "valid")]
    (train_LxNxD, words, tags), (test_LxNxD, test_words, test_tags) = found
    names, counts = np.unique(tags, return_counts=True)
    if len(names) < 2 or not len(test_tags):
        raise UserError(f"task {task.name} has {len(names)} tags in {len(tags)} words; a probe needs two.")
    rng = np.random.default_rng(seed)
    types = sorted({*words, *test_words})
    drawn = dict(zip(types, rng.choice(names, len(types), p=counts / counts.sum()), strict=True))
    control, test_control = ([drawn[word] for word in own] for own in (words, test_words))
    accuracy, by_heart = [], []
    for train, test in zip(train_LxNxD, test_LxNxD, strict=True):
        accuracy.append(_fitted(train, tags, test, test_tags))
        by_heart.append(_fitted(train, control, test, test_control))
    return {
        "accuracy": accuracy,
        "control": by_heart,
        "selectivity": [a - c for a, c in zip(accuracy, by_heart, strict=True)],
        "majority": float(np.mean(np.asarray(test_tags) == names[counts.argmax()])),
        "words": len(test_tags),
    }


def _fitted(train_NxD: np.ndarray, tags: Sequence[str], test_NxD: np.ndarray, test_tags: Sequence[str]) -> float:
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise UserError("a probe needs scikit-learn: pip install -e '.[tasks]'.") from None
    if len(set(tags)) < 2:
        return float(np.mean([tag == tags[0] for tag in test_tags]))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train_NxD, tags)
    return float(probe.score(test_NxD, test_tags))


def _streams(
    subject: Any, tokenizer: Any, examples: Sequence[Any], longest: int
) -> tuple[np.ndarray, list[str], list[str]]:
    """The residual stream at the last token of each word, [L + 1, N, D], the words and their tags."""
    streams, words, tags = [], [], []
    for example in examples:
        ids, ends = [tokenizer.eot], []
        for number, word in enumerate(example.words):
            ids += tokenizer.encode(f" {word}" if number else word).tolist()
            ends.append(len(ids) - 1)
        kept = [i for i, end in enumerate(ends) if end < longest]
        if not kept:
            continue
        ids = ids[:longest]
        padding = longest - len(ids) if subject.causal else 0  # one length, compiled once; nothing sees pads
        taken = subject(np.array([ids + [0] * padding], np.int32), Taps(collect=("residual",))).intermediates
        stream_LxTxD = np.concatenate([taken["residual"][:, 0], taken["residual_out"]])
        streams.append(stream_LxTxD[:, [ends[i] for i in kept]])
        words += [example.words[i] for i in kept]
        tags += [example.tags[i] for i in kept]
    if not streams:
        raise UserError("no text of the task has a word within the tokens that are read.")
    return np.concatenate(streams, axis=1), words, tags
