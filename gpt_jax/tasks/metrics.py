"""Metrics over predictions: functions (predictions, golds, labels) -> float, from the libraries the field trusts.

What a prediction and its gold are, by kind of task:

    classify          the label's name          the label's name
    tag               tags, one per word        tags, one per word
    multiple_choice   index of the choice       index of the choice
    preference        0 chosen, 1 rejected      0
    text_to_text      generated text            tuple of acceptable texts
    span_qa           text of the answer        tuple of acceptable answers
    dialogue          text of the last turn     tuple of it alone

Scales are those of the reference implementations: BLEU, chrF, and SQuAD's exact_match and f1 run from 0 to 100, the
others from 0 to 1 (mcc from -1). Libraries are imported when a metric is computed; they are the extra `tasks`.
"""

from __future__ import annotations

import collections
import importlib
import re
import string
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.options import import_path
from gpt_jax.text_quality import distinct_n, mean_seq_rep_n, self_bleu

Golds = Sequence[Any]
Texts = Sequence[str]


def compute(name: str, kind: str, predictions: Sequence, golds: Golds, labels: Sequence[str] = ()) -> float:
    """Returns a metric of METRICS, or of an import path, over predictions of a task of `kind`."""
    function = import_path(name) if ":" in name else METRICS[name][1]
    if kind == "tag":
        for prediction, gold in zip(predictions, golds, strict=True):
            if isinstance(prediction, str) or len(prediction) != len(gold):
                raise UserError(f"a prediction has {len(prediction)} tags for {len(gold)} words: {prediction!r}.")
    return float(function(predictions, golds, labels))


# Classes and tags.


def accuracy(predictions: Sequence, golds: Golds, labels: Sequence[str] = ()) -> float:
    """Share of right predictions: of words where there are tags, of texts equal to a reference but for outer space."""
    pairs = _flat(predictions, golds)
    return sum(_is_right(prediction, gold) for prediction, gold in pairs) / len(pairs)


def macro_f1(predictions: Sequence, golds: Golds, labels: Sequence[str] = ()) -> float:
    """Mean of F1 over `labels` (those that occur in the golds if none are named); a class never met counts 0."""
    return _f1(predictions, golds, labels, "macro")


def micro_f1(predictions: Sequence, golds: Golds, labels: Sequence[str] = ()) -> float:
    """F1 of the counts summed over `labels`; the accuracy, unless predictions lie outside the labels."""
    return _f1(predictions, golds, labels, "micro")


def mcc(predictions: Sequence, golds: Golds, labels: Sequence[str] = ()) -> float:
    """Matthews' correlation coefficient (Gorodkin's for more than two classes)."""
    predicted, gold = zip(*_flat(predictions, golds), strict=True)
    return _library("sklearn.metrics").matthews_corrcoef(gold, predicted)


def entity_f1(predictions: Sequence, golds: Golds, labels: Sequence[str] = ()) -> float:
    """Micro F1 of entities, exact in type and bounds, from BIO tags as conlleval reads them."""
    return _entities("f1_score", predictions, golds)


def entity_precision(predictions: Sequence, golds: Golds, labels: Sequence[str] = ()) -> float:
    """Share of predicted entities that are right."""
    return _entities("precision_score", predictions, golds)


def entity_recall(predictions: Sequence, golds: Golds, labels: Sequence[str] = ()) -> float:
    """Share of true entities that are found."""
    return _entities("recall_score", predictions, golds)


# Short answers: SQuAD's (Rajpurkar et al. 2016), from 0 to 100.

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower-cases and drops ASCII punctuation, then articles and extra white space, as SQuAD's evaluation does."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predictions: Texts, golds: Golds, labels: Sequence[str] = ()) -> float:
    """Percentage of predictions equal to a reference, both normalized."""
    hits = [normalize_answer(p) in map(normalize_answer, gold) for p, gold in zip(predictions, golds, strict=True)]
    return 100.0 * sum(hits) / len(hits)


def f1(predictions: Texts, golds: Golds, labels: Sequence[str] = ()) -> float:
    """Mean over predictions of the best F1 with a reference, as bags of normalized words, in percent."""
    scores = [max(_bag_f1(p, reference) for reference in gold) for p, gold in zip(predictions, golds, strict=True)]
    return 100.0 * sum(scores) / len(scores)


def _bag_f1(prediction: str, reference: str) -> float:
    ours, theirs = normalize_answer(prediction).split(), normalize_answer(reference).split()
    common = (collections.Counter(ours) & collections.Counter(theirs)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


# Generated text against references.


def bleu(predictions: Texts, golds: Golds, labels: Sequence[str] = ()) -> float:
    """sacreBLEU's corpus BLEU: 13a tokens, case kept, any number of references each."""
    return _library("sacrebleu").corpus_bleu(list(predictions), _streams(golds)).score


def chrf(predictions: Texts, golds: Golds, labels: Sequence[str] = ()) -> float:
    """sacreBLEU's chrF2 of the corpus."""
    return _library("sacrebleu").corpus_chrf(list(predictions), _streams(golds)).score


def rouge1(predictions: Texts, golds: Golds, labels: Sequence[str] = ()) -> float:
    """Mean ROUGE-1 F of the best reference, stemmed (rouge-score)."""
    return _rouge("rouge1", predictions, golds)


def rouge2(predictions: Texts, golds: Golds, labels: Sequence[str] = ()) -> float:
    """Mean ROUGE-2 F of the best reference, stemmed (rouge-score)."""
    return _rouge("rouge2", predictions, golds)


def rouge_l(predictions: Texts, golds: Golds, labels: Sequence[str] = ()) -> float:
    """Mean ROUGE-L F of the best reference, stemmed (rouge-score)."""
    return _rouge("rougeL", predictions, golds)


# Generated text by itself; words are what white space separates.


def seq_rep_n(texts: Texts, n: int = 4) -> float:
    """Mean over texts of 1 - different / all n-grams (Welleck et al. 2020); texts without one are left out."""
    return mean_seq_rep_n((text.split() for text in texts), n)


def self_bleu_4(texts: Texts) -> float:
    """Mean BLEU-4 of each text against all others: see `gpt_jax.text_quality.self_bleu`."""
    return self_bleu(texts, 4)


# The libraries.


# What metrics need of the extra `tasks`.
LIBRARIES = {
    **dict.fromkeys(("macro_f1", "micro_f1", "mcc"), "sklearn.metrics"),
    **dict.fromkeys(("entity_f1", "entity_precision", "entity_recall"), "seqeval.metrics"),
    **dict.fromkeys(("bleu", "chrf"), "sacrebleu"),
    **dict.fromkeys(("rouge1", "rouge2", "rougeL"), "rouge_score.rouge_scorer"),
}


def require(metrics: Sequence[str]) -> None:
    """Raises UserError if a library of these metrics is not installed: before a run, not at its end."""
    for name in metrics:
        if name in LIBRARIES:
            _library(LIBRARIES[name])


def _library(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"this metric needs the extra 'tasks' ({error}): pip install -e '.[tasks]'.") from None


def _f1(predictions: Sequence, golds: Golds, labels: Sequence[str], average: str) -> float:
    predicted, gold = zip(*_flat(predictions, golds), strict=True)
    names = list(labels) or sorted(set(gold))
    score = _library("sklearn.metrics").f1_score
    return score(gold, predicted, labels=names, average=average, zero_division=0.0)


def _entities(name: str, predictions: Sequence, golds: Golds) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of no entity found: the 0 says so
        score = getattr(_library("seqeval.metrics"), name)
        return score([list(g) for g in golds], [list(p) for p in predictions], zero_division=0)


def _streams(golds: Golds) -> list[list[str | None]]:
    """Turns references by example into sacreBLEU's streams, None where an example has fewer than the most."""
    most = max(map(len, golds))
    return [[gold[i] if i < len(gold) else None for gold in golds] for i in range(most)]


def _rouge(name: str, predictions: Texts, golds: Golds) -> float:
    scorer = _library("rouge_score.rouge_scorer").RougeScorer([name], use_stemmer=True)
    scores = [scorer.score_multi(gold, p)[name].fmeasure for p, gold in zip(predictions, golds, strict=True)]
    return sum(scores) / len(scores)


def _flat(predictions: Sequence, golds: Golds) -> list[tuple[Any, Any]]:
    """Returns (prediction, gold) pairs; where both are sequences of tags, one pair for each word."""
    pairs = list(zip(predictions, golds, strict=True))
    if isinstance(pairs[0][1], tuple) and not isinstance(pairs[0][0], str):
        return [pair for p, g in pairs for pair in zip(p, g, strict=True)]
    return pairs


def _is_right(prediction: Any, gold: Any) -> bool:
    if isinstance(gold, tuple):
        return prediction.strip() in [reference.strip() for reference in gold]
    return prediction == gold


_LABELLED = ("classify", "tag", "multiple_choice", "preference")
_TEXT = ("text_to_text", "span_qa", "dialogue")

# name -> (kinds it is for, function)
METRICS: dict[str, tuple[tuple[str, ...], Callable[..., float]]] = {
    "accuracy": ((*_LABELLED, *_TEXT), accuracy),
    "macro_f1": (("classify", "tag"), macro_f1),
    "micro_f1": (("classify", "tag"), micro_f1),
    "mcc": (("classify", "tag"), mcc),
    "entity_f1": (("tag",), entity_f1),
    "entity_precision": (("tag",), entity_precision),
    "entity_recall": (("tag",), entity_recall),
    "exact_match": (_TEXT, exact_match),
    "f1": (_TEXT, f1),
    "bleu": (_TEXT, bleu),
    "chrf": (_TEXT, chrf),
    "rouge1": (_TEXT, rouge1),
    "rouge2": (_TEXT, rouge2),
    "rougeL": (_TEXT, rouge_l),
    "distinct_1": (_TEXT, lambda predictions, golds, labels: distinct_n(predictions, 1)),
    "distinct_2": (_TEXT, lambda predictions, golds, labels: distinct_n(predictions, 2)),
    "distinct_3": (_TEXT, lambda predictions, golds, labels: distinct_n(predictions, 3)),
    "self_bleu_4": (_TEXT, lambda predictions, golds, labels: self_bleu_4(predictions)),
    "seq_rep_4": (_TEXT, lambda predictions, golds, labels: seq_rep_n(predictions, 4)),
}
