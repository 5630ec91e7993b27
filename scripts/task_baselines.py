"""What simple methods get on the test split of each task: the figures that a trained model is held against.

    python scripts/task_baselines.py                     # the tasks of $GPT_JAX_DATA
    python scripts/task_baselines.py python_kinds babi:3 # any other

By kind: the majority class or tag; the input copied (the passage's sentence most like the question, the summary's first
sentence); the nearest training example's output; logistic regression on bags of words (scikit-learn). Nothing is tuned
on the test split. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import string
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from gpt_jax.errors import UserError
from gpt_jax.tasks import Task, load_task
from gpt_jax.tasks.metrics import normalize_answer

REAL = ("sst2", "ag_news", "wnut17", "squad", "e2e", "multi30k", "scitldr", "babi")
# The first sentence of an abstract, without the words around it, is what "copy" copies.
COPIED = {"scitldr": {"sentences": 1, "template": "{source}"}}
_WORD = re.compile(r"\w+|[^\w\s]")
_SHAPES = {ord(c): "0" if c.isdigit() else "A" if c.isupper() else "a" for c in string.ascii_letters + string.digits}
_SPAN_QUESTIONS = 3000  # that the span model learns from: more takes minutes
_LONGEST_SPAN = 8  # words


def most_frequent(values: Iterable[str]) -> str:
    return collections.Counter(values).most_common(1)[0][0]


def logistic(rows, labels: Sequence, C: float = 10.0) -> LogisticRegression:
    return LogisticRegression(C=C, max_iter=300, tol=1e-3).fit(rows, labels)


def features() -> CountVectorizer:
    """Returns a vectorizer of rows that are lists of features: of those that at least two training rows have."""
    return CountVectorizer(analyzer=list, min_df=2, dtype=np.float32)


def bags(train: Sequence[str], test: Sequence[str], pairs: bool = True) -> tuple:
    """Returns TF-IDF matrices of words (and pairs of them) that occur in the training texts."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 1 + pairs), sublinear_tf=True, token_pattern=r"\S+", dtype=np.float32)
    return vectorizer.fit_transform(train), vectorizer.transform(test)


def classify(task: Task, train: list, test: list) -> Iterator[tuple[str, list]]:
    """Majority class; logistic regression on words and pairs of words."""
    labels = [e.label for e in train]
    yield "majority", [most_frequent(labels)] * len(test)
    train_x, test_x = bags([e.document for e in train], [e.document for e in test])
    yield "bag of words", logistic(train_x, labels).predict(test_x).tolist()


def tag(task: Task, train: list, test: list) -> Iterator[tuple[str, list]]:
    """The majority tag; each word's own; logistic regression on a word, its shape and its neighbours."""
    majority = most_frequent(tag for e in train for tag in e.tags)
    yield "majority", [[majority] * len(e.words) for e in test]
    seen = collections.defaultdict(list)
    for e in train:
        for word, name in zip(e.words, e.tags, strict=True):
            seen[word].append(name)
    known = {word: most_frequent(tags) for word, tags in seen.items()}
    yield "tag of the word", [[known.get(word, majority) for word in e.words] for e in test]
    vectorizer = features()
    train_x = vectorizer.fit_transform(word_features(e.words, i) for e in train for i in range(len(e.words)))
    model = logistic(train_x, [name for e in train for name in e.tags], C=1.0)
    test_x = vectorizer.transform(word_features(e.words, i) for e in test for i in range(len(e.words)))
    found = iter(model.predict(test_x).tolist())
    yield "bag of words", [[next(found) for _ in e.words] for e in test]


def word_features(words: Sequence[str], i: int) -> list[str]:
    """What is known of word i: itself, its shape and ends, and the words beside it."""
    around = ["<s>", "<s>", *words, "</s>", "</s>"][i : i + 5]
    word = words[i]
    out = [f"{k}:{w.lower()}" for k, w in enumerate(around)]
    return [*out, f"shape:{shape_of(word)}", f"3:{word[-3:]}", f"first:{i == 0}", f"pair:{around[1]} {word}"]


def shape_of(word: str) -> str:
    """Returns 'Aa0' for 'Word12': its kinds of characters, runs of one made one."""
    return re.sub(r"(.)\1+", r"\1", word.translate(_SHAPES))


def text_to_text(task: Task, train: list, test: list) -> Iterator[tuple[str, list]]:
    """The most frequent target and logistic regression over targets, if these are few; else copying and the nearest."""
    targets = [e.target for e in train]
    few = len(set(targets)) <= 100
    if not few:
        name = next((n for n in COPIED if task.name == n), "")
        copied = load_task(name, **COPIED[name]).examples("test")[: len(test)] if name else test
        yield ("first sentence" if name else "copy"), [e.source.strip() for e in copied]
        train_x, test_x = bags([e.source for e in train], [e.source for e in test], pairs=False)
        yield "nearest", [targets[i] for i in nearest(train_x, test_x)]
        return
    groups = sorted({e.group for e in test})
    found: dict[str, list] = {"majority": [""] * len(test), "bag of words": [""] * len(test)}
    for group in groups:  # each of bAbI's tasks is learned by itself
        ours, at = [e for e in train if e.group == group], [i for i, e in enumerate(test) if e.group == group]
        labels = [e.target for e in ours]
        train_x, test_x = bags(*([with_question(e.source) for e in side] for side in (ours, [test[i] for i in at])))
        for i, label in zip(at, logistic(train_x, labels).predict(test_x).tolist(), strict=True):
            found["majority"][i], found["bag of words"][i] = most_frequent(labels), label
    yield from found.items()


def with_question(source: str) -> str:
    """Marks the words of the last line, the question, as its own."""
    *story, question = source.strip().split("\n")
    return " ".join([*story, *(f"q:{word}" for word in question.split())])


def nearest(train, test) -> list[int]:
    """Returns the training row with the largest cosine for each test row."""
    return [int(row) for at in range(0, test.shape[0], 256) for row in (test[at : at + 256] @ train.T).argmax(1).flat]


def span_qa(task: Task, train: list, test: list) -> Iterator[tuple[str, list]]:
    """The sentence most like the question; the span whose words logistic regression finds likeliest in an answer."""
    yield "copy", [e.context[begin:end] for e in test for begin, end in [best_sentences(e, 1)[0]]]
    vectorizer = features()
    learned = train[:: max(1, len(train) // _SPAN_QUESTIONS)]
    places = [candidates(e) for e in learned]
    inside = []
    for e, words in zip(learned, places, strict=True):
        text, start = e.answers[0]
        inside += [start <= begin < start + len(text) for begin, _ in words]
    rows = (row for e, words in zip(learned, places, strict=True) for row in qa_features(e, words))
    model = logistic(vectorizer.fit_transform(rows), inside, C=1.0)
    predictions = []
    for e in test:
        words = candidates(e)
        odds = model.decision_function(vectorizer.transform(qa_features(e, words)))
        begin, end = likeliest(odds)
        predictions.append(e.context[words[begin][0] : words[end - 1][1]])
    yield "bag of words", predictions


def best_sentences(example, count: int) -> list[tuple[int, int]]:
    """Returns the bounds of the sentences that share most words, rare ones counting more, with the question."""
    bounds = [m.span() for m in re.finditer(r"\S.*?(?:[.!?](?=\s)|$)", example.context, re.S)]
    asked = set(normalize_answer(example.question).split())
    sentences = [set(normalize_answer(example.context[a:b]).split()) for a, b in bounds]
    often = collections.Counter(word for sentence in sentences for word in sentence)
    scores = [sum(1 / often[word] for word in sorted(asked & sentence)) for sentence in sentences]
    order = sorted(range(len(bounds)), key=lambda i: (-scores[i], i))
    return [bounds[i] for i in order[:count]]


def candidates(example) -> list[tuple[int, int]]:
    """Returns the bounds of the words of the two sentences most like the question, in order."""
    found = [m.span() for a, b in best_sentences(example, 2) for m in _WORD.finditer(example.context, a, b)]
    return sorted(found) or [(0, len(example.context))]


def qa_features(example, places: Sequence[tuple[int, int]]) -> Iterator[list[str]]:
    """What is known of each word: if the question has it or its neighbours; itself and its shape, by the question."""
    words = [example.context[a:b] for a, b in places]
    asked = [w.lower() for w in _WORD.findall(example.question)]
    kind = next((w for w in asked if w in ("who", "when", "where", "why", "how", "which", "what")), "")
    kind += " many" * ("many" in asked or "much" in asked) + " year" * ("year" in asked)
    for i, word in enumerate(words):
        shape = shape_of(word)
        near = [f"{k}:{words[i + k].lower() in asked}" for k in (-2, -1, 0, 1, 2) if 0 <= i + k < len(words)]
        yield [*near, *(f"{kind}|{f}" for f in (shape, word.lower())), f"{shape}|{word.lower() in asked}"]


def likeliest(odds: np.ndarray) -> tuple[int, int]:
    """Returns the bounds of the run of at most _LONGEST_SPAN words with the largest sum of log odds."""
    sums = np.concatenate([[0.0], np.cumsum(odds)])
    spans = [(a, b) for a in range(len(odds)) for b in range(a + 1, min(len(odds), a + _LONGEST_SPAN) + 1)]
    return max(spans, key=lambda span: sums[span[1]] - sums[span[0]])


METHODS = {"classify": classify, "tag": tag, "text_to_text": text_to_text, "span_qa": span_qa}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=REAL, help="names; those of $GPT_JAX_DATA if none")
    parser.add_argument("--limit", type=int, default=0, help="examples per split, 0 for all")
    args = parser.parse_args()
    report: dict[str, dict] = {}
    for name in args.tasks:
        began = time.monotonic()
        task = load_task(name, limit=args.limit)
        if task.kind not in METHODS:
            raise UserError(f"task {name}: no baseline for kind {task.kind!r}; there are for: {', '.join(METHODS)}.")
        train, test = task.examples("train"), task.examples("test")
        report[name] = {"train": len(train), "test": len(test)}
        print(f"{name}: {len(train):,} training and {len(test):,} test examples")
        for row, predictions in METHODS[task.kind](task, train, test):
            report[name][row] = {metric: round(v, 4) for metric, v in task.score(predictions, test).items()}
            shown = {metric: v for metric, v in report[name][row].items() if "/" not in metric}
            print(f"  {row:16}" + "  ".join(f"{metric} {v:.4g}" for metric, v in shown.items()), flush=True)
        print(f"  ({time.monotonic() - began:.0f} s)")
    print(json.dumps(report))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
