"""Definitions of Python's own library, which every installation has: what the python_* tasks are made of.

The source is read with `ast` and never imported; what is found is kept in the cache, since parsing it all takes
seconds. Splits are by the hash of what an example shows, so that nothing is on both sides.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator

from gpt_jax.data import cache, corpora
from gpt_jax.tasks.base import Example, Split

SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
# Longer code is cut (a module, a class) or left out (a function, a method).
LONGEST = 1500


@dataclasses.dataclass(frozen=True)
class Definition:
    """A module, class or function.

    Attributes:
      name: 'json.encoder.JSONEncoder.encode'. kind: module, class, function or method.
      code: its source without its docstring, not indented. doc: the docstring, cleaned, or ''.
      line: of `code` on which the body begins, from 0.
    """

    name: str
    kind: str
    code: str
    doc: str
    line: int


def definitions() -> list[Definition]:
    """Returns the library's definitions, those of equal code once, sorted by the hash of their code."""
    memo = cache.cache_root() / "tasks"
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, path in corpora.library_files() for stat in [path.stat()]]
    key = cache.content_hash([1, LONGEST, sys.version, files])
    found = cache.remembered(memo, f"python_library {key}", lambda: [dataclasses.astuple(d) for d in _read_all()])
    return [Definition(*values) for values in found]


def library_splits(build: Callable[[Definition], Example | None], size: int) -> dict[str, Split]:
    """Returns the splits of the examples that `build` makes of definitions; None leaves one out.

    Args:
      size: most examples in all; each split has its share of SHARES, in the order of the code's hash.
    """

    def examples(split: str) -> Iterator[Example]:
        left = round(size * SHARES[split])
        for example in distinct(map(build, definitions())):
            if split_of(example.document) == split:
                yield example
                left -= 1
                if left == 0:
                    return

    return {split: lambda split=split: examples(split) for split in SHARES}


def distinct(examples: Iterable[Example | None]) -> Iterator[Example]:
    """Yields the examples that are not None, of those with the same document the first."""
    seen = set()
    for example in examples:
        if example is not None and example.document not in seen:
            seen.add(example.document)
            yield example


def split_of(text: str) -> str:
    """Returns the split that a text belongs to, by its own hash."""
    at = _digest(text) / 2**64
    for split, share in reversed(SHARES.items()):
        if at < share:
            return split
        at -= share
    return "train"


def _digest(text: str) -> int:
    # Salted: the split must not be told by the order, which is that of the same text's hash without it.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, salt=b"split").digest(), "little")


def _read_all() -> list[Definition]:
    found: dict[str, Definition] = {}
    for module, path in corpora.library_files():
        with contextlib.suppress(SyntaxError, ValueError, RecursionError, OSError):
            for definition in read_module(module, path.read_bytes().decode("utf-8")):
                found.setdefault(definition.code, definition)
    return sorted(found.values(), key=lambda d: hashlib.blake2b(d.code.encode(), digest_size=8).digest())


def read_module(module: str, source: str) -> Iterator[Definition]:
    """Yields the definitions of a module's source; their code is at most LONGEST characters long.

    Raises:
      SyntaxError, ValueError: the source is not Python.
    """
    lines = source.split("\n")

    def visit(node: ast.AST, name: str, parent: ast.AST | None) -> Iterator[Definition]:
        kind = _kind(node, parent)
        if kind:
            name = f"{name}.{node.name}" if kind != "module" else name
            definition = _definition(node, name, kind, lines)
            if definition:
                yield definition
        for child in ast.iter_child_nodes(node):
            yield from visit(child, name, node)

    yield from visit(ast.parse(source), module, None)


def _kind(node: ast.AST, parent: ast.AST | None) -> str:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return "method" if isinstance(parent, ast.ClassDef) else "function"
    return {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "")


def _definition(node: ast.AST, name: str, kind: str, lines: list[str]) -> Definition | None:
    body = list(node.body)
    doc = ast.get_docstring(node) or ""
    first, last = 1, len(lines)
    if kind != "module":
        first, last = min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno
    removed = range(0)
    if doc or _is_text(body[:1]):
        removed = range(body[0].lineno, body[0].end_lineno + 1)
        body = body[1:]
    if not body or (kind != "module" and body[0].lineno <= node.lineno):
        return None  # nothing but a docstring, or all on one line
    if removed and body[0].lineno <= removed[-1]:
        return None  # code on the docstring's last line
    kept = [lines[number - 1] for number in range(first, last + 1) if number not in removed]
    code = textwrap.dedent("\n".join(kept)).strip("\n")
    if kind in ("module", "class"):
        code = code[:LONGEST]
    begin = min([body[0].lineno, *(d.lineno for d in getattr(body[0], "decorator_list", []))])
    if len(code) > LONGEST or not code.strip() or not _encodable(code + doc):
        return None
    return Definition(name, kind, code, doc, begin - first - len(removed) if kind != "module" else 0)


def _is_text(body: list[ast.stmt]) -> bool:
    return bool(body) and isinstance(body[0], ast.Expr) and isinstance(getattr(body[0].value, "value", None), str)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return True
