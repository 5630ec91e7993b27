"""Corpora: streams of (id, text) documents with a fingerprint; embedded ones need no download.

`python_docs` is the English prose of every Python installation (the language reference in pydoc_data.topics and the
docstrings of the standard library, read with `ast` and never imported), `python_source` the library's source.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import pathlib
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any

from gpt_jax.data import cache
from gpt_jax.data.readers import Document, Progress, expand_paths, file_format, named_damage, read_documents
from gpt_jax.errors import UserError, nearest
from gpt_jax.files import atomic_write

EMBEDDED = ("python_docs", "python_source")
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus that can be streamed any number of times, always the same.

    Attributes:
      name: as told to the user.
      read: yields (id, text); adds what it reads to the Progress it is given.
      identify: computes the fingerprint.
      fingerprint: {'corpus': ..., 'sha256': ...} and what else identifies it; a function of the content alone.
      total_bytes: stored bytes that `read` goes through, for the ETA; 0 if not known.
    """

    name: str
    read: Callable[[Progress], Iterator[Document]]
    identify: Callable[[], dict[str, Any]]
    total_bytes: int = 0

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        return self.identify()

    def documents(self, progress: Progress | None = None) -> Iterator[Document]:
        """Yields (id, text) of every document that is not empty; raises UserError if there is none."""
        progress = progress or Progress()
        progress.total += self.total_bytes
        empty = True
        for name, text in self.read(progress):
            if text:
                empty = False
                yield name, text
        if empty:
            raise UserError(f"the corpus {self.name} holds no text.")


def open_corpus(
    corpus: str = "python_docs", path: str = "", text_key: str = "text", memo: pathlib.Path | None = None
) -> Corpus:
    """Returns the corpus that a config names.

    Args:
      corpus: python_docs, python_source, 'hf:NAME[:CONFIG[:SPLIT]]', or 'files' with `path`.
      path: comma-separated files or globs; if set, it is the corpus.
      text_key: field or column of the text in jsonl, csv, tsv and parquet files.
      memo: folder where slow results (extracted docstrings, hashes of files) are remembered; None keeps nothing.

    Raises:
      UserError: unknown corpus, missing file, unknown format.
    """
    if path:
        return _file_corpus(path, text_key, memo)
    if corpus in EMBEDDED:
        return _embedded_corpus(corpus, memo)
    if corpus.startswith("hf:"):
        return _hugging_face_corpus(corpus, text_key)
    if corpus == "files":
        raise UserError("data.corpus is 'files' but data.path names none.")
    allowed = [*EMBEDDED, "files", "hf:NAME"]
    raise UserError(f"data.corpus is {corpus!r}{nearest(corpus, allowed)}; allowed: {', '.join(allowed)}.")


def iter_documents(corpus: str = "python_docs", path: str = "", text_key: str = "text") -> Iterator[Document]:
    """Yields (id, text) of a corpus; arguments as `open_corpus`."""
    yield from open_corpus(corpus, path, text_key).documents()


def library_files() -> list[tuple[str, pathlib.Path]]:
    """Returns (dotted module name, file) of the standard library's own modules, sorted; tests are left out."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(d for d in folders if d not in _SKIPPED_FOLDERS)
        for file in files:
            if file.endswith(".py"):
                path = pathlib.Path(folder, file)
                parts = path.relative_to(root).with_suffix("").parts
                found.append((".".join(parts).removesuffix(".__init__"), path))
    return sorted(found)


def docstrings(module: str, source: str) -> Iterator[tuple[str, str, ast.AST]]:
    """Yields (qualified name, cleaned docstring, node) of a module's source in the order of the text.

    Raises:
      SyntaxError, ValueError: the source is not Python.
    """

    def visit(node: ast.AST, name: str):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if not isinstance(node, ast.Module):
                name = f"{name}.{node.name}"
            text = ast.get_docstring(node)
            if text:
                yield name, text, node
        for child in ast.iter_child_nodes(node):
            yield from visit(child, name)

    yield from visit(ast.parse(source), module)


def _read_source() -> Iterator[Document]:
    for module, path in library_files():
        with contextlib.suppress(UnicodeDecodeError, OSError):
            yield module, path.read_bytes().decode("utf-8")


def _read_docs() -> Iterator[Document]:
    """Yields each text once: the topics of the language reference, then the docstrings."""
    seen = set()
    with contextlib.suppress(ImportError):
        topics = importlib.import_module("pydoc_data.topics").topics
        for name in sorted(topics):
            if topics[name] not in seen:
                seen.add(topics[name])
                yield f"topics.{name}", topics[name]
    for module, source in _read_source():
        with contextlib.suppress(SyntaxError, ValueError, RecursionError):
            for name, text, _ in docstrings(module, source):
                if text not in seen and _encodable(text):
                    seen.add(text)
                    yield name, text


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a docstring with an escaped half surrogate
        return False
    return True


def _embedded_corpus(name: str, memo: pathlib.Path | None) -> Corpus:
    read = {"python_docs": _read_docs, "python_source": _read_source}[name]
    if memo is not None:
        files = [(m, s.st_size, s.st_mtime_ns) for m, p in library_files() for s in [p.stat()]]
        signature = cache.content_hash([1, name, sys.version, str(sysconfig.get_path("stdlib")), files])
        path = memo / f"{name}-{signature}.jsonl"
        if not path.exists():
            memo.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps({"id": i, "text": t}) + "\n" for i, t in read())
            atomic_write(path, "".join(lines))

        def read(path=path):
            yield from read_documents(path)

    def fingerprint():
        digest, size, count = hashlib.sha256(), 0, 0
        for _, text in read():
            data = text.encode("utf-8")
            digest.update(len(data).to_bytes(8, "little") + data)
            size, count = size + len(data), count + 1
        return {
            "corpus": name,
            "python": platform.python_version(),
            "documents": count,
            "bytes": size,
            "sha256": digest.hexdigest(),
        }

    total = 0
    if memo is not None:
        found = cache.remembered(memo, str(path), fingerprint)
        fingerprint, total = (lambda: found), found["bytes"]

    def counted(progress: Progress) -> Iterator[Document]:
        for name, text in read():
            progress.done += len(text.encode("utf-8"))
            yield name, text

    return Corpus(name, counted, fingerprint, total)


def _file_corpus(paths: str, text_key: str, memo: pathlib.Path | None) -> Corpus:
    def file_sha256(file: pathlib.Path) -> str:
        with named_damage(file):
            return cache.file_sha256(file)

    files = expand_paths(paths)
    for file in files:
        file_format(file)
    hashes = []
    for file in files:
        stat = file.stat()
        key = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        hashes.append(cache.remembered(memo, key, lambda file=file: file_sha256(file)))
    total = sum(f.stat().st_size for f in files)
    formats = ["".join(file_format(f)) for f in files]
    fingerprint = {
        "corpus": "files",
        "files": [f.name for f in files],
        "stored_bytes": total,
        "sha256": hashlib.sha256(json.dumps([text_key, formats, hashes]).encode()).hexdigest(),
    }

    def read(progress: Progress) -> Iterator[Document]:
        for file in files:
            yield from read_documents(file, text_key, progress)

    return Corpus(paths, read, lambda: fingerprint, total)


def _hugging_face_corpus(name: str, text_key: str) -> Corpus:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UserError(f"data.corpus {name!r} needs the extra 'hf': pip install -e '.[hf]'.") from None
    _, dataset, *rest = name.split(":")
    subset, split = [*rest, "", ""][:2]
    try:
        table = datasets.load_dataset(dataset, subset or None, split=split or "train")
    except Exception as error:  # the library raises dozens of kinds; each is the user's to see, in one line
        raise UserError(f"data.corpus {name!r}: {' '.join(str(error).split())[:300]}") from None
    if text_key not in table.column_names:
        raise UserError(f"data.corpus {name!r} has no column {text_key!r} (it has {', '.join(table.column_names)}).")

    def read(progress: Progress) -> Iterator[Document]:
        for number, row in enumerate(table):
            progress.done += 1
            yield f"{dataset}:{number}", row[text_key] or ""

    fingerprint = {"corpus": name, "documents": len(table), "sha256": cache.content_hash(table._fingerprint)}
    return Corpus(name, read, lambda: fingerprint, len(table))
