"""Variety, repetition and copying of texts: counted by hand, and against NLTK (self-BLEU-4: test_task_metrics.py)."""

import numpy as np
import pytest

from gpt_jax.errors import UserError
from gpt_jax.text_quality import (
    bootstrap,
    copied_counts,
    copy_rate,
    distinct_n,
    mean_seq_rep_n,
    self_bleu,
    self_bleu_scores,
    seq_rep_n,
)


def test_distinct_counts_n_grams_of_all_texts_together():
    assert distinct_n(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert distinct_n(["a b a", "a b"], 2) == pytest.approx(2 / 3)
    assert distinct_n(["a", ""], 2) == 0


def test_repetition_counts_the_last_n_gram_too():
    assert seq_rep_n([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)  # without the last one it would be 0
    assert seq_rep_n([7] * 6, n=2) == pytest.approx(1 - 1 / 5)
    assert seq_rep_n([1, 2, 3]) is None
    assert mean_seq_rep_n([[7] * 5, [1, 2, 3, 4, 5], [1]]) == pytest.approx(1 / 4)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_self_bleu_of_any_order_is_what_nltk_gives(n):
    from nltk.translate import bleu_score as bleu

    rng = np.random.default_rng(n)
    texts = [[str(w) for w in rng.choice(list("abcdef"), rng.integers(3, 12))] for _ in range(15)]
    smooth = bleu.SmoothingFunction().method1
    each = [
        bleu.sentence_bleu(texts[:i] + texts[i + 1 :], text, weights=[1 / n] * n, smoothing_function=smooth)
        for i, text in enumerate(texts)
    ]
    joined = [" ".join(text) for text in texts]
    assert self_bleu_scores(joined, n) == pytest.approx(each)
    assert self_bleu(joined, n) == pytest.approx(np.mean(each))
    assert self_bleu(["the cat sat on a mat"] * 3, n) == pytest.approx(1)


def test_whole_texts_are_copies_but_for_case_and_white_space():
    training = ["A good film .", "Bad !"]
    assert copy_rate(["a good  film .", "a good film", "bad !", "new"], training) == pytest.approx(1 / 2)
    assert copy_rate([], training) == 0


def test_n_grams_are_copied_from_within_one_training_text():
    training = iter(["a b c d", "e f"])  # d e is in none of the two
    copied, of = copied_counts(["a b c", "d e f", "x"], training, n=2)
    assert copied == [2, 1, 0] and of == [2, 2, 0]
    assert copy_rate(["a b c", "d e f", "x"], ["a b c d", "e f"], n=2) == pytest.approx(3 / 4)
    with pytest.raises(UserError, match="n is -1"):
        copy_rate(["a"], ["a"], n=-1)


def test_the_bootstrap_of_a_mean_has_the_width_of_its_normal_interval():
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    low, high = bootstrap(lambda rows: values[rows].mean(), 400)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
