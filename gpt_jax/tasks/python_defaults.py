"""Defaults of parameters: a question on a function of Python's library; the answer is a span of its source."""

import ast
import hashlib

from gpt_jax.tasks.base import SpanQA, Task
from gpt_jax.tasks.python_library import Definition, library_splits


def task(size: int = 3000, longest: int = 600, longest_answer: int = 40) -> Task:
    """Embedded: nothing is downloaded. Lengths are in characters.

    Of a function with several defaults one parameter is asked for, chosen by the hash of the code.
    """

    def build(definition: Definition) -> SpanQA | None:
        code = definition.code
        if definition.kind not in ("function", "method") or len(code) > longest or not code.isascii():
            return None
        found = [(name, text, at) for name, text, at in defaults(code) if len(text) <= longest_answer]
        if not found:
            return None
        name, text, at = found[hashlib.blake2b(code.encode(), digest_size=4).digest()[0] % len(found)]
        question = f"What is the default of parameter {name}?"
        return SpanQA(f"{definition.name}.{name}", question, code, ((text, at),), where=definition.name)

    return Task(
        name="python_defaults",
        kind="span_qa",
        metrics=("exact_match", "f1"),
        splits=library_splits(build, size),
    )


def defaults(code: str) -> list[tuple[str, str, int]]:
    """Returns (parameter, source of its default, its first character) of a function's code, which must be ASCII."""
    try:
        node = ast.parse(code).body[0]
    except SyntaxError:  # a text at the left margin, inside: the code cannot be unindented
        return []
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    pairs = [*zip(positional[len(positional) - len(given.defaults) :], given.defaults, strict=True)]
    pairs += [pair for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True) if pair[1] is not None]
    starts = [0]
    for line in code.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    out = []
    for parameter, value in pairs:
        begin = starts[value.lineno - 1] + value.col_offset
        end = starts[value.end_lineno - 1] + value.end_col_offset
        out.append((parameter.arg, code[begin:end], begin))
    return out
