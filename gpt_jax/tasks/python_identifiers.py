"""Roles of identifiers: tags each token of a function of Python's library."""

import ast
import builtins
import io
import keyword
import tokenize

from gpt_jax.tasks.base import Tagged, Task
from gpt_jax.tasks.python_library import Definition, library_splits

TAGS = ("argument", "attribute", "builtin", "definition", "keyword", "local", "other", "parameter")
_SPACE = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER)
_LONGEST_TEXT = 20


def task(size: int = 3000, longest: int = 60) -> Task:
    """Embedded: nothing is downloaded. Functions and methods of 8 to `longest` tokens.

    A name is an `attribute` after a dot, an `argument` before the = of a call, a `definition` after def or class; else
    a `parameter` or a `local` of the function or of one inside it, a `builtin`, or `other`, as are all other tokens.
    """

    def build(definition: Definition) -> Tagged | None:
        # Taking code to tokens is slow: what is too long for so few is not tried.
        if definition.kind not in ("function", "method") or len(definition.code) > 15 * longest:
            return None
        if not definition.code.isascii():
            return None
        found = tag_tokens(definition.code)
        if found is None or not 8 <= len(found) <= longest:
            return None
        words, tags = zip(*found, strict=True)
        return Tagged(words, tags, where=definition.name)

    return Task(
        name="python_identifiers",
        kind="tag",
        labels=TAGS,
        metrics=("accuracy", "macro_f1"),
        splits=library_splits(build, size),
    )


def tag_tokens(code: str) -> list[tuple[str, str]] | None:
    """Returns (token, tag) of the code of a function, or None if it cannot be parsed alone or has f-strings."""
    try:
        tree = ast.parse(code)
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(code).readline) if t.type not in _SPACE]
    except (SyntaxError, tokenize.TokenError, ValueError):
        return None
    nodes = list(ast.walk(tree))
    if any(isinstance(node, ast.JoinedStr) for node in nodes):
        return None  # Python 3.12 takes them apart, 3.11 does not
    parameters = {node.arg for node in nodes if isinstance(node, ast.arg)}
    arguments = {(node.lineno, node.col_offset) for node in nodes if isinstance(node, ast.keyword) and node.arg}
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    out, before = [], ""
    for token in tokens:
        text = token.string
        if token.type == tokenize.STRING and (len(text) > _LONGEST_TEXT or not text.isprintable() or " " in text):
            text = '"..."'
        out.append((text, _tag(token, before, parameters, arguments, stored)))
        before = token.string
    return out


def _tag(token: tokenize.TokenInfo, before: str, parameters: set, arguments: set, stored: set) -> str:
    name = token.string
    if token.type != tokenize.NAME:
        return "other"
    if keyword.iskeyword(name):
        return "keyword"
    if before in ("def", "class"):
        return "definition"
    if before == ".":
        return "attribute"
    if token.start in arguments:
        return "argument"
    if name in parameters:
        return "parameter"
    if name in stored:
        return "local"
    return "builtin" if hasattr(builtins, name) else "other"
