"""Metrics of tasks give hand-counted and published values, and agree with brute force."""

import collections
import itertools
import math
import re
import string
import sys

import numpy as np
import pytest

from gpt_jax.errors import UserError
from gpt_jax.tasks import metrics
from gpt_jax.tasks.metrics import METRICS, compute

GOLD = ["a", "a", "a", "b", "b", "c"]
PREDICTED = ["a", "a", "b", "b", "c", "c"]


def test_accuracy_and_f1_of_classes_are_those_counted_by_hand():
    assert compute("accuracy", "classify", PREDICTED, GOLD) == pytest.approx(4 / 6)
    # precision, recall: a 2/2, 2/3; b 1/2, 1/2; c 1/2, 1/1
    assert compute("macro_f1", "classify", PREDICTED, GOLD, ("a", "b", "c")) == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)
    assert compute("micro_f1", "classify", PREDICTED, GOLD, ("a", "b", "c")) == pytest.approx(4 / 6)
    assert compute("macro_f1", "classify", PREDICTED, GOLD, ("a", "b", "c", "d")) == pytest.approx(
        (0.8 + 0.5 + 2 / 3) / 4
    )


def test_a_prediction_outside_the_labels_is_wrong_and_belongs_to_no_class():
    predicted = ["a", "a", "what?", "b", "b", "c"]
    assert compute("accuracy", "classify", predicted, GOLD) == pytest.approx(5 / 6)
    assert compute("macro_f1", "classify", predicted, GOLD, ("a", "b", "c")) == pytest.approx((0.8 + 1 + 1) / 3)
    # 5 right, of 5 predicted within the labels and 6 true
    assert compute("micro_f1", "classify", predicted, GOLD, ("a", "b", "c")) == pytest.approx(2 * 5 / (5 + 6))


def test_mcc_is_the_closed_form_of_two_classes_and_the_correlation_of_indicators_of_more():
    gold, predicted = ["y"] * 6 + ["n"] * 4, ["y"] * 5 + ["n"] + ["y"] * 2 + ["n"] * 2
    tp, fn, fp, tn = 5, 1, 2, 2
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert compute("mcc", "classify", predicted, gold) == pytest.approx(expected)

    def covariance(x, y):
        one_hot = [np.array([[v == name for name in "abc"] for v in values], float) for values in (x, y)]
        return sum(((a - a.mean(0)) * (b - b.mean(0))).sum() for a, b in [one_hot])

    expected = covariance(GOLD, PREDICTED) / math.sqrt(covariance(GOLD, GOLD) * covariance(PREDICTED, PREDICTED))
    assert compute("mcc", "classify", PREDICTED, GOLD) == pytest.approx(expected)
    assert compute("mcc", "classify", ["y"] * 10, gold) == 0


def test_accuracy_counts_words_of_tags_texts_of_several_references_and_choices():
    assert compute("accuracy", "tag", [["O", "X"], ["O"]], [("O", "O"), ("O",)]) == pytest.approx(2 / 3)
    assert compute("accuracy", "text_to_text", [" milk\n", "Milk"], [("apple", "milk"), ("milk",)]) == 0.5
    assert compute("accuracy", "multiple_choice", [0, 2, 1], [0, 1, 1]) == pytest.approx(2 / 3)


def entities(tags):
    """Entities as conlleval reads BIO tags: I- after another type, or after O, begins one."""
    out, start, before = set(), None, ("O", "")
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        begins = prefix == "B" or (prefix == "I" and (before[0] == "O" or before[1] != kind))
        if start is not None and (prefix == "O" or begins):
            out.add((start, i, before[1]))
            start = None
        if begins:
            start = i
        before = (prefix, kind)
    return out


def test_entity_f1_needs_type_and_bounds_and_agrees_with_brute_force():
    gold = [("B-per", "I-per", "O", "B-loc"), ("O", "B-per")]
    predicted = [["B-per", "O", "O", "B-loc"], ["O", "B-loc"]]
    # one of three predicted, one of three true
    assert compute("entity_f1", "tag", predicted, gold) == pytest.approx(1 / 3)
    assert compute("entity_f1", "tag", [["O"] * 4, ["O"] * 2], gold) == 0
    names = ["O", "O", "B-per", "I-per", "B-loc", "I-loc"]
    rng = np.random.default_rng(0)
    gold, predicted = ([tuple(rng.choice(names, n).tolist()) for n in range(1, 40)] for _ in range(2))
    right = sum(len(entities(p) & entities(g)) for p, g in zip(predicted, gold, strict=True))
    found, true = (sum(len(entities(tags)) for tags in side) for side in (predicted, gold))
    assert 0 < right < min(found, true)
    assert compute("entity_precision", "tag", predicted, gold) == pytest.approx(right / found)
    assert compute("entity_recall", "tag", predicted, gold) == pytest.approx(right / true)
    assert compute("entity_f1", "tag", predicted, gold) == pytest.approx(2 * right / (found + true))


def test_tags_of_another_number_than_words_are_refused():
    with pytest.raises(UserError, match="1 tags for 2 words"):
        compute("accuracy", "tag", [["O"]], [("O", "O")])
    with pytest.raises(UserError, match="2 words"):
        compute("entity_f1", "tag", ["O "], [("O", "O")])


@pytest.mark.parametrize(
    "prediction, answers, exact, f1",
    [
        ("the Denver Broncos!", ["Denver Broncos"], 1, 1),
        ("Denver  Broncos\nwon", ["a Denver broncos", "Broncos"], 0, 0.8),
        ("Santa Clara", ["Santa Clara, California", "Levi's Stadium"], 0, 0.8),
        ("Levis stadium", ["Levi's Stadium"], 1, 1),
        ("gold gold blue", ["gold blue blue"], 0, 2 / 3),
        ("", ["x"], 0, 0),
        ("an", ["the"], 1, 0),  # the official script: equal when normalized, but no word in common
        ("“quoted”", ["quoted"], 0, 0),  # only ASCII punctuation goes
        ("theatre another", ["theatre another"], 1, 1),
    ],
)
def test_squad_scores_are_those_of_the_official_rules(prediction, answers, exact, f1):
    assert compute("exact_match", "span_qa", [prediction], [tuple(answers)]) == pytest.approx(100 * exact)
    assert compute("f1", "span_qa", [prediction], [tuple(answers)]) == pytest.approx(100 * f1)


def test_squad_scores_agree_with_another_implementation_on_random_answers():
    def normalize(text):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return [w for w in re.split(r"\s+", text) if w and w not in ("a", "an", "the")]

    def best(prediction, answers):
        ours, scores = normalize(prediction), []
        for answer in answers:
            theirs, common = normalize(answer), 0
            left = list(theirs)
            for word in ours:
                if word in left:
                    left.remove(word)
                    common += 1
            scores.append(2 * common / (len(ours) + len(theirs)) if common else 0.0)
        return max(scores), any(ours == normalize(a) for a in answers)

    rng = np.random.default_rng(0)
    words = ["the", "The", "cat,", "cat", "sat", "a", "mat.", "on", "An", "u.s.", "us"]
    texts = [" ".join(rng.choice(words, rng.integers(0, 5))) for _ in range(600)]
    predictions, golds = texts[:200], [tuple(texts[i : i + 2]) for i in range(200, 600, 2)]
    expected = [best(p, g) for p, g in zip(predictions, golds, strict=True)]
    assert compute("f1", "span_qa", predictions, golds) == pytest.approx(100 * np.mean([f for f, _ in expected]))
    assert compute("exact_match", "span_qa", predictions, golds) == 100 * np.mean([e for _, e in expected])


def test_bleu_and_chrf_are_the_published_values_of_sacrebleus_example():
    references = [
        ("The dog bit the man.", "The dog had bit the man."),
        ("It was not unexpected.", "No one was surprised."),
        ("The man bit him first.", "The man had bitten the dog."),
    ]
    predictions = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    assert compute("bleu", "text_to_text", predictions, references) == pytest.approx(48.530827, abs=1e-6)
    assert compute("chrf", "text_to_text", predictions, references) == pytest.approx(59.73, abs=5e-3)


def test_a_reference_that_is_missing_changes_nothing_more_than_one_that_is_repeated():
    predictions = ["the cat sat on the mat today", "a dog ran over the green hill", "it is so"]
    ragged = [("the cat sat on a mat",), ("a dog ran over a hill", "the dog ran over the green hill"), ("it is so",)]
    repeated = [(r * 2)[:2] for r in ragged]
    for metric in ("bleu", "chrf", "rougeL", "f1"):
        value = compute(metric, "text_to_text", predictions, ragged)
        assert value == pytest.approx(compute(metric, "text_to_text", predictions, repeated))
        assert value > compute(metric, "text_to_text", predictions, [r[:1] for r in ragged])


def test_rouge_is_counted_by_hand_and_takes_the_best_reference():
    gold = [("the cat lay down", "dogs")]
    # 2 of 3 and 4 words, 1 of 2 and 3 pairs, common subsequence of 2
    assert compute("rouge1", "text_to_text", ["the cat sat"], gold) == pytest.approx(4 / 7)
    assert compute("rouge2", "text_to_text", ["the cat sat"], gold) == pytest.approx(2 / 5)
    assert compute("rougeL", "text_to_text", ["cat sat the"], gold) == pytest.approx(2 / 7)
    assert compute("rouge1", "text_to_text", ["dog"], gold) == 1  # stemmed


def test_distinct_and_repetition_are_counted_by_hand():
    texts = ["a b a b", "a b", ""]
    none = [("",)] * 3
    assert compute("distinct_1", "text_to_text", texts, none) == pytest.approx(2 / 6)
    assert compute("distinct_2", "text_to_text", texts, none) == pytest.approx(2 / 4)
    assert compute("distinct_3", "text_to_text", texts, none) == 1
    assert metrics.distinct_n(texts, 5) == 0
    assert metrics.seq_rep_n(["a a a a a a"]) == pytest.approx(2 / 3)
    # The last 4-gram is the one that repeats.
    assert metrics.seq_rep_n(["a b c d a b c d", "too short"]) == pytest.approx(1 / 5)
    assert metrics.seq_rep_n(["a b c d e", "x x x x x"]) == pytest.approx(1 / 4)


def test_self_bleu_of_equal_texts_is_1_and_of_disjoint_ones_0():
    assert metrics.self_bleu_4(["the cat sat on the mat"] * 3) == pytest.approx(1)
    assert metrics.self_bleu_4(["a b c d", "e f g h"]) == 0
    with pytest.raises(UserError, match="at least two"):
        metrics.self_bleu_4(["alone"])


def test_self_bleu_is_what_nltk_gives_for_each_text_against_all_others():
    from nltk.translate import bleu_score as bleu

    rng = np.random.default_rng(0)
    texts = [[str(w) for w in rng.choice(list("abcdefgh"), rng.integers(2, 14))] for _ in range(30)] + [["z"]]
    smooth = bleu.SmoothingFunction().method1
    each = []
    for i, text in enumerate(texts):
        each.append(bleu.sentence_bleu(texts[:i] + texts[i + 1 :], text, smoothing_function=smooth))
    assert 0 < np.mean(each) < 1
    assert metrics.self_bleu_4([" ".join(t) for t in texts]) == pytest.approx(np.mean(each))


def test_every_metric_is_best_for_the_truth():
    kinds = {
        "classify": ["x", "y", "x"],
        "tag": [("B-a", "I-a", "O"), ("O", "B-b"), ("B-a",)],
        "multiple_choice": [0, 2, 1],
        "text_to_text": [("the cat sat on the mat",), ("dogs ran over the hill",), ("it is a good day",)],
        "span_qa": [("one answer",), ("another one", "x"), ("third",)],
        "dialogue": [("hello there my old friend",), ("and good bye to you",), ("see you soon my dear",)],
    }
    best = collections.Counter()
    for kind, (name, (allowed, _)) in itertools.product(kinds, METRICS.items()):
        if kind not in allowed or name.startswith(("distinct", "self", "seq")):
            continue
        gold = kinds[kind]
        truth = [g[0] for g in gold] if kind in ("text_to_text", "span_qa", "dialogue") else gold
        top = 100 if name in ("bleu", "chrf", "exact_match", "f1") else 1
        if kind == "span_qa" and name in ("bleu", "rouge2"):
            continue  # one word has no pairs
        assert compute(name, kind, truth, gold) == pytest.approx(top), (kind, name)
        wrong = [truth[-1], *truth[:-1]] if kind != "tag" else [tuple("O" for _ in g) for g in gold]
        assert compute(name, kind, wrong, gold) < top, (kind, name)
        best[kind] += 1
    assert set(best) == set(kinds)


def test_a_missing_library_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[tasks\]'"):
        compute("bleu", "text_to_text", ["a"], [("a",)])
