"""Tasks without code: files of your own, one function per kind of example.

    load_task({"name": "classification", "train": "reviews.tsv", "text": "{title}: {body}", "label": "stars"})

Templates name columns in braces. Tables are .tsv, .csv or .jsonl, plain or .gz, .xz, .zst; the first line of a .tsv or
.csv names its columns unless `columns` does. Without a file for `valid`, `hold_out` of the training examples are, by
the hash of their text.
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from gpt_jax.data.readers import local_path
from gpt_jax.errors import UserError
from gpt_jax.tasks.base import (
    Classify,
    Dialogue,
    Malformed,
    MultipleChoice,
    Preference,
    Tagged,
    Task,
    TextToText,
    files,
)
from gpt_jax.tasks.readers import BadRow, Row, make, read_conll, read_parallel, read_squad, read_table


def classification(
    train: str,
    valid: str = "",
    test: str = "",
    text: str = "{text}",
    text_b: str = "",
    label: str = "label",
    labels: Sequence[str] = (),
    columns: Sequence[str] = (),
    metrics: Sequence[str] = ("accuracy", "macro_f1"),
    hold_out: float = 0.1,
) -> Task:
    """A table with a column of labels; `labels` are those of the training file, sorted, if not given."""

    def build(row: Row) -> Classify:
        return Classify(row.fill(text), row.text(label).strip(), row.fill(text_b), where=row.where)

    def read(path: pathlib.Path) -> Iterator[Classify | Malformed]:
        return make(read_table(path, columns), build)

    return Task(
        name="classification",
        kind="classify",
        labels=tuple(labels) or _names(train, read, lambda item: [item.label]),
        metrics=tuple(metrics),
        splits=files(read, hold_out, train=train, valid=valid, test=test),
    )


def text_to_text(
    train: str,
    valid: str = "",
    test: str = "",
    source: str = "{source}\n",
    target: str = "{target}",
    references: str = "",
    columns: Sequence[str] = (),
    metrics: Sequence[str] = ("bleu", "rougeL"),
    hold_out: float = 0.1,
) -> Task:
    """A table; `source` and `target` are templates, `references` a .jsonl column with a list of acceptable texts."""

    def build(row: Row) -> TextToText:
        wanted = row.fill(target)
        others = row[references] if references else []
        if not isinstance(others, list) or not all(isinstance(text, str) for text in others):
            raise BadRow(f"column {references!r} is no list of texts")
        return TextToText(row.fill(source), wanted, tuple(dict.fromkeys([wanted, *others])), where=row.where)

    return Task(
        name="text_to_text",
        kind="text_to_text",
        metrics=tuple(metrics),
        splits=files(
            lambda path: make(read_table(path, columns), build), hold_out, train=train, valid=valid, test=test
        ),
    )


def parallel(
    train: str,
    valid: str = "",
    test: str = "",
    template: str = "{source}\n",
    metrics: Sequence[str] = ("bleu", "chrf"),
    hold_out: float = 0.1,
) -> Task:
    """Two line-aligned files per split, 'train.de,train.en': a line of the first is turned into that of the second."""

    def read(paths: pathlib.Path) -> Iterator[TextToText | Malformed]:
        names = str(paths).split(",")
        if len(names) != 2:
            raise UserError(f"task parallel needs two files per split, 'a.de,a.en'; it has {str(paths)!r}.")
        rows = read_parallel(*(local_path(name) for name in names))
        return make(rows, lambda row: TextToText(row.fill(template), row["target"], where=row.where))

    return Task(
        name="parallel",
        kind="text_to_text",
        metrics=tuple(metrics),
        splits=files(read, hold_out, train=train, valid=valid, test=test),
    )


def tagging(
    train: str,
    valid: str = "",
    test: str = "",
    word: int = 0,
    tag: int = -1,
    labels: Sequence[str] = (),
    metrics: Sequence[str] = ("entity_f1", "accuracy"),
    hold_out: float = 0.1,
) -> Task:
    """CoNLL columns (a word a line); `labels` are the training file's tags, sorted, if not given."""

    def read(path: pathlib.Path) -> Iterator[Tagged | Malformed]:
        return make(read_conll(path, word, tag), lambda row: Tagged(row["words"], row["tags"], where=row.where))

    return Task(
        name="tagging",
        kind="tag",
        labels=tuple(labels) or _names(train, read, lambda item: item.tags),
        metrics=tuple(metrics),
        splits=files(read, hold_out, train=train, valid=valid, test=test),
    )


def span_qa(
    train: str,
    valid: str = "",
    test: str = "",
    metrics: Sequence[str] = ("exact_match", "f1"),
    hold_out: float = 0.1,
) -> Task:
    """SQuAD JSON files."""
    return Task(
        name="span_qa",
        kind="span_qa",
        metrics=tuple(metrics),
        splits=files(read_squad, hold_out, train=train, valid=valid, test=test),
    )


def multiple_choice(
    train: str = "",
    valid: str = "",
    test: str = "",
    prompt: str = "{prompt}",
    choices: str = "choices",
    answer: str = "answer",
    hold_out: float = 0.1,
) -> Task:
    """A .jsonl file: a template of the prompt, a column with the list of choices and one with the right one's index."""

    def build(row: Row) -> MultipleChoice:
        texts, right = row[choices], row[answer]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise BadRow(f"column {choices!r} is no list of texts")
        if isinstance(right, bool) or not str(right).isdecimal():
            raise BadRow(f"column {answer!r} is {right!r}; the number of a choice, from 0, is needed")
        return MultipleChoice(row.fill(prompt), tuple(texts), int(right), where=row.where)

    return Task(
        name="multiple_choice",
        kind="multiple_choice",
        metrics=("accuracy",),
        splits=files(lambda path: make(read_table(path), build), hold_out, train=train, valid=valid, test=test),
    )


def dialogue(
    train: str,
    valid: str = "",
    test: str = "",
    turns: str = "messages",
    role: str = "role",
    content: str = "content",
    labels: Sequence[str] = (),
    metrics: Sequence[str] = ("f1", "bleu", "distinct_2"),
    hold_out: float = 0.1,
) -> Task:
    """A .jsonl file whose column `turns` lists {"role", "content"}; `labels` are the roles allowed, () is any."""

    def build(row: Row) -> Dialogue:
        found = []
        for number, turn in enumerate(row[turns] if isinstance(row[turns], list) else []):
            if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in (role, content)):
                raise BadRow(f"turn {number} has no texts under {role!r} and {content!r}")
            found.append((turn[role], turn[content]))
        return Dialogue(tuple(found), where=row.where)

    return Task(
        name="dialogue",
        kind="dialogue",
        labels=tuple(labels),
        metrics=tuple(metrics),
        splits=files(lambda path: make(read_table(path), build), hold_out, train=train, valid=valid, test=test),
    )


def preferences(
    train: str,
    valid: str = "",
    test: str = "",
    prompt: str = "{prompt}",
    chosen: str = "{chosen}",
    rejected: str = "{rejected}",
    columns: Sequence[str] = (),
    hold_out: float = 0.1,
) -> Task:
    """A table; the prompt, the better answer and the worse one are templates."""

    def build(row: Row) -> Preference:
        return Preference(row.fill(prompt), row.fill(chosen), row.fill(rejected), where=row.where)

    return Task(
        name="preferences",
        kind="preference",
        metrics=("accuracy",),
        splits=files(
            lambda path: make(read_table(path, columns), build), hold_out, train=train, valid=valid, test=test
        ),
    )


def _names(path: str, read: Callable, names: Callable[..., Iterable[str]]) -> tuple[str, ...]:
    """Returns the labels of a training file, sorted; an empty one is none."""
    found = read(local_path(path))
    return tuple(sorted({n for item in found if not isinstance(item, Malformed) for n in names(item) if n.strip()}))
