"""Reading rows of labelled data: TSV, CSV and JSONL, CoNLL columns, SQuAD JSON, bAbI archives, aligned files.

A reader yields `Row`s (named columns) or examples, and a `Malformed` in the place of a row that is neither: what is
malformed must not stop a generator, since the task may want to skip it. Files may end in .gz, .xz or .zst.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import pathlib
import string
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from gpt_jax.data.readers import file_format, open_stream, read_lines
from gpt_jax.errors import UserError, nearest
from gpt_jax.tasks.examples import Example, Malformed, SpanQA

_JSON_NAMES = {str: "text", int: "whole number", list: "list"}


class BadRow(Exception):
    """Raised by what makes an example of a row: the message says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Named columns of one row, and the file and line it begins on."""

    where: str
    columns: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        if name not in self.columns:
            raise BadRow(f"no column {name!r}{nearest(name, self.columns)}; it has: {', '.join(self.columns)}")
        return self.columns[name]

    def text(self, name: str) -> str:
        """Returns a column as text; a number is written out."""
        value = self[name]
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise BadRow(f"column {name!r} holds no text but {json.dumps(value, default=str)[:60]}")
        return str(value)

    def fill(self, template: str) -> str:
        """Returns the template with each {column} replaced by the row's text; {{ and }} are braces."""
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise UserError(f"template {template!r}: {error}; a brace in the text is written twice.") from None
        return "".join(text + (self.text(name) if name is not None else "") for text, name, *_ in parts)


def make(rows: Iterable[Any], build: Callable[[Any], Example]) -> Iterator[Example | Malformed]:
    """Yields build(row) of every row (anything with a `where`); a BadRow, or a malformed row, becomes a Malformed."""
    for row in rows:
        if isinstance(row, Malformed):
            yield row
            continue
        try:
            yield build(row)
        except BadRow as error:
            yield Malformed(row.where, str(error))


def read_table(path: pathlib.Path, columns: Sequence[str] = ()) -> Iterator[Row | Malformed]:
    """Yields the rows of a .tsv, .csv or .jsonl file.

    Args:
      columns: names of a .tsv's or .csv's columns; if none, its first line names them. A .tsv has no quoting.

    Raises:
      UserError: the file cannot be read, or is none of these.
    """
    kind, _ = file_format(path)
    if kind == ".jsonl":
        yield from _read_jsonl(path)
    elif kind in (".tsv", ".csv"):
        yield from _read_columns(path, columns, kind)
    else:
        raise UserError(f"{path}: rows are read from .tsv, .csv or .jsonl files, not from {kind}.")


def _read_jsonl(path: pathlib.Path) -> Iterator[Row | Malformed]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Malformed(where, f"not JSON ({error})")
            continue
        if isinstance(value, dict):
            yield Row(where, value)
        else:
            yield Malformed(where, f"not a JSON object but {line.strip()[:60]}")


def _read_columns(path: pathlib.Path, columns: Sequence[str], kind: str) -> Iterator[Row | Malformed]:
    csv.field_size_limit(1 << 30)
    dialect = {"delimiter": ","} if kind == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    rows = csv.reader((line for _, line in read_lines(path)), strict=True, **dialect)
    names = list(columns)
    while True:
        begin = rows.line_num + 1
        try:
            values = next(rows, None)
        except csv.Error as error:
            yield Malformed(f"{path}:{begin}", str(error))
            continue
        if values is None:
            return
        if not values:
            continue
        if not names:
            names = values
        elif len(values) != len(names):
            yield Malformed(f"{path}:{begin}", f"{len(values)} columns in place of {len(names)} ({', '.join(names)})")
        else:
            yield Row(f"{path}:{begin}", dict(zip(names, values, strict=True)))


def read_conll(path: pathlib.Path, word: int = 0, tag: int = -1) -> Iterator[Row | Malformed]:
    """Yields {'words': tuple, 'tags': tuple} of each sentence: a word a line, sentences apart by an empty line.

    Args:
      word, tag: numbers of their columns, from 0; columns are apart by tabs, or by spaces in a file without tabs.
        Lines of -DOCSTART- are left out. A sentence with a line of another number of columns is malformed, as is one
        without the columns asked for.
    """
    lines = ((number, line.rstrip("\r\n")) for number, line in read_lines(path))
    width = None
    for blank, group in itertools.groupby(lines, key=lambda line: not line[1].strip()):
        if blank:
            continue
        sentence, problem = [], None
        for number, line in group:
            values = line.split("\t") if "\t" in line else line.split()
            if values[0] == "-DOCSTART-":
                continue
            width = width or max(len(values), 2)
            if len(values) != width and not problem:
                problem = Malformed(f"{path}:{number}", f"{len(values)} columns in place of {width}: {line[:60]!r}")
            sentence.append((number, values))
        missing = [column for column in (word, tag) if sentence and not -width <= column < width]
        if problem:
            yield problem
        elif missing:
            yield Malformed(f"{path}:{sentence[0][0]}", f"no column {missing[0]} in {width} columns, counted from 0")
        elif sentence:
            words, tags = (tuple(values[column] for _, values in sentence) for column in (word, tag))
            yield Row(f"{path}:{sentence[0][0]}", {"words": words, "tags": tags})


def read_squad(path: pathlib.Path) -> Iterator[SpanQA | Malformed]:
    """Yields the questions of a SQuAD JSON file; an answer given several times is kept once.

    Raises:
      UserError: no JSON, or none with a list of articles under 'data'; what is wrong within it is yielded as malformed.
    """
    with open_stream(path) as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8")
        articles = json.loads(text)["data"]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 (byte {error.start + 1}).") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}).") from None
    except RecursionError as error:
        raise UserError(f"{path}: not JSON ({error}).") from None
    except (KeyError, TypeError):
        articles = None
    if not isinstance(articles, list):
        raise UserError(f"{path}: no SQuAD file: a JSON object with a list under 'data' is needed.")
    at, line = 0, 1
    for place, paragraph, question in _squad_questions(articles):
        where, name = f"{path} ({place})", ""
        if isinstance(question, dict):
            name = str(question.get("id"))
            found = text.find(json.dumps(name), at)
            if found >= 0:
                line, at = line + text.count("\n", at, found), found
            where = f"{path}:{line} (question {name})"
        try:
            if isinstance(question, BadRow):
                raise question
            answers = dict.fromkeys(
                (_under(answer, "text", str), _under(answer, "answer_start", int))
                for answer in _under(question, "answers", list)
            )
            asked, context = _under(question, "question", str), _under(paragraph, "context", str)
            yield SpanQA(name, asked, context, tuple(answers), where=where)
        except BadRow as error:
            yield Malformed(where, str(error))


def _squad_questions(articles: list) -> Iterator[tuple[str, Any, Any]]:
    """Yields (place, paragraph, question); the question is a BadRow where there is no list to find it in."""
    for a, article in enumerate(articles, 1):
        for p, paragraph in enumerate(_entries(article, "paragraphs"), 1):
            for q, question in enumerate(_entries(paragraph, "qas"), 1):
                yield f"article {a}, paragraph {p}, question {q}", paragraph, question


def _entries(value: Any, name: str) -> list:
    """Returns the list under a name, or a BadRow alone that says that there is none."""
    try:
        return [value] if isinstance(value, BadRow) else _under(value, name, list)
    except BadRow as error:
        return [error]


def _under(value: Any, name: str, kind: type) -> Any:
    """Returns what a JSON object has under a name, if it is of the kind; else raises BadRow."""
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise BadRow(f"no {_JSON_NAMES[kind]} under {name!r}")
    return found


def read_babi(archive: pathlib.Path, task: str, split: str) -> Iterator[Row | Malformed]:
    """Yields the questions of one file of an archive of bAbI stories (Weston et al. 2015).

    Args:
      task, split: how the file's name begins and what it ends in but for .txt: 'qa3_' and 'train'.

    A row has 'story' (a tuple of the statements before the question, earlier questions left out), 'question', 'answer',
    'supports' (numbers of the statements that tell it, from 0) and 'number' (of the story in the file).
    """
    try:
        with open_stream(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                file = member.name.rpartition("/")[2]
                if file.startswith(task) and file.endswith(f"{split}.txt"):
                    data = tar.extractfile(member).read()
                    break
            else:
                raise UserError(f"{archive} has no file {task}...{split}.txt.")
    except tarfile.TarError as error:
        raise UserError(f"{archive}: no tar archive, or a damaged one ({error}).") from None
    name = f"{archive}/{file}"
    story: dict[int, str] = {}
    number = -1
    for line_number, line in enumerate(data.decode("utf-8").splitlines(), 1):
        where = f"{name}:{line_number}"
        index, _, text = line.strip().partition(" ")
        if not index.isdecimal():
            yield Malformed(where, f"no number before the text {line.strip()[:60]!r}")
            continue
        if index == "1":
            story, number = {}, number + 1
        if "\t" not in text:
            story[int(index)] = text
            continue
        question, *rest = (part.strip() for part in text.split("\t"))
        try:
            answer, supports = rest
            lines = list(story)
            supports = tuple(lines.index(int(s)) for s in supports.split())
        except ValueError:
            yield Malformed(where, f"not question, answer and numbers of earlier statements: {text[:60]!r}")
            continue
        columns = {"story": tuple(story.values()), "question": question, "answer": answer, "supports": supports}
        yield Row(where, columns | {"number": number})


def read_parallel(source: pathlib.Path, target: pathlib.Path) -> Iterator[Row]:
    """Yields {'source', 'target'} of two line-aligned files; raises UserError if one has more lines."""
    missing = object()
    for a, b in itertools.zip_longest(read_lines(source), read_lines(target), fillvalue=missing):
        if a is missing or b is missing:
            longer, shorter, number = (target, source, b[0]) if a is missing else (source, target, a[0])
            raise UserError(f"{longer}:{number}: {shorter} ends before this line; the two files are not aligned.")
        yield Row(f"{source}:{a[0]}", {"source": a[1].rstrip("\r\n"), "target": b[1].rstrip("\r\n")})
