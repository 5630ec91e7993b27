"""Kinds of definitions: is this the body of a class, a function, a generator, a method, a module or a property?"""

import ast
import itertools
import textwrap
from collections.abc import Iterator

from gpt_jax.tasks.base import Classify, Task
from gpt_jax.tasks.python_library import SHARES, Definition, definitions, distinct, split_of

KINDS = ("class", "function", "generator", "method", "module", "property")
_PROPERTIES = ("property", "cached_property", "setter", "getter", "deleter")


def task(size: int = 4200, longest: int = 400) -> Task:
    """Embedded: nothing is downloaded. About as many of each kind.

    The line with `def` or `class`, which would tell, and the decorators are left out; so is what follows the first
    `longest` characters.
    """

    def build(definition: Definition) -> Classify | None:
        kind = kind_of(definition)
        text = textwrap.dedent("\n".join(definition.code.split("\n")[definition.line :]))[:longest].strip("\n")
        return Classify(text, kind, where=definition.name) if kind and len(text) >= 20 else None

    def examples(split: str) -> Iterator[Classify]:
        most = round(size * SHARES[split] / len(KINDS))
        found: dict[str, list[Classify]] = {kind: [] for kind in KINDS}
        for example in distinct(map(build, definitions())):
            if split_of(example.document) == split and len(found[example.label]) < most:
                found[example.label].append(example)
        for turn in itertools.zip_longest(*found.values()):
            yield from filter(None, turn)

    return Task(
        name="python_kinds",
        kind="classify",
        labels=KINDS,
        metrics=("accuracy", "macro_f1"),
        splits={split: lambda split=split: examples(split) for split in SHARES},
    )


def kind_of(definition: Definition) -> str:
    """Returns which of KINDS a definition is: a generator yields, whether it is a method or not."""
    if definition.kind in ("class", "module"):
        return definition.kind
    if "yield" not in definition.code and not definition.code.startswith("@"):
        return definition.kind
    try:
        node = ast.parse(definition.code).body[0]
    except SyntaxError:  # a text at the left margin, inside: the code cannot be unindented
        return ""
    names = [d.attr if isinstance(d, ast.Attribute) else getattr(d, "id", "") for d in node.decorator_list]
    if any(name in _PROPERTIES for name in names):
        return "property"
    return "generator" if any(_yields(statement) for statement in node.body) else definition.kind


def _yields(node: ast.AST) -> bool:
    if isinstance(node, (ast.Yield, ast.YieldFrom)):
        return True
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
        return False  # its yields make it a generator, not what it stands in
    return any(_yields(child) for child in ast.iter_child_nodes(node))
