"""The embedded tasks say what Python itself says of its library."""

import ast
import importlib
import inspect
import time

import pytest

from gpt_jax.data import corpora
from gpt_jax.tasks import load_task
from gpt_jax.tasks.python_defaults import defaults
from gpt_jax.tasks.python_identifiers import tag_tokens
from gpt_jax.tasks.python_kinds import kind_of
from gpt_jax.tasks.python_library import definitions, read_module, split_of

SOME = ("json", "csv", "calendar", "textwrap", "argparse", "fractions", "difflib", "configparser", "string", "ast")
TASKS = (
    "python_docstrings",
    "python_kinds",
    "python_identifiers",
    "python_defaults",
    "python_choices",
    "python_dialogue",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def few_modules(cache, monkeypatch):
    """The library as if it had a few modules only: reading it all takes seconds."""
    found = [(n, p) for n, p in corpora.library_files() if n.split(".")[0] in SOME]
    monkeypatch.setattr(corpora, "library_files", lambda: found)
    monkeypatch.setenv("GPT_JAX_CACHE", str(cache))


def resolve(name):
    """Imports the object that a definition's name names; None if it is inside a function."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        for part in parts[n:]:
            value = inspect.getattr_static(value, part, None)
        return value
    return None


def test_definitions_have_the_code_without_its_docstring():
    source = '''"""Module."""
import os

@cache
def f(a,
      b=1):
    """Doc
    of f."""
    # why

    return a


class A(B):
    "Only a docstring."


class C:
    """Doc of C."""

    x = 1

    def g(self): return 1

    def h(self):
        return """
left
"""
'''
    found = {d.name: d for d in read_module("m", source)}
    assert list(found) == ["m", "m.f", "m.C", "m.C.h"]
    assert found["m.f"].code == "@cache\ndef f(a,\n      b=1):\n    # why\n\n    return a"
    assert found["m.f"].doc == "Doc\nof f." and found["m.f"].kind == "function"
    assert found["m.f"].code.split("\n")[found["m.f"].line] == "    return a"
    assert found["m.C"].code.startswith("class C:\n\n    x = 1\n\n    def g(self)") and found["m.C"].kind == "class"
    assert found["m.C"].code.split("\n")[found["m.C"].line] == "    x = 1"
    assert found["m"].code.startswith("import os\n\n@cache") and found["m"].doc == "Module."
    assert found["m.C.h"].kind == "method"


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_valid_disjoint_and_the_same_each_time(few_modules, name):
    task = load_task(name, size=200)
    found = {split: task.examples(split) for split in ("train", "valid", "test")}
    assert found == {split: load_task(name, size=200).examples(split) for split in found}
    texts = [{e.document for e in items} for items in found.values()]
    assert len(set.union(*texts)) == sum(map(len, texts))
    assert 0 < len(found["valid"]) <= 24 and 0 < len(found["test"]) <= 24 and 60 < len(found["train"]) <= 163


def test_the_split_of_a_text_does_not_depend_on_its_place():
    sizes = [split_of(f"text {i}") for i in range(4000)]
    assert sizes == [split_of(f"text {i}") for i in range(4000)]
    assert abs(sizes.count("valid") - 400) < 80 and abs(sizes.count("test") - 400) < 80


def test_docstrings_are_the_first_paragraph_of_what_inspect_gives(few_modules):
    found = load_task("python_docstrings", size=200).examples("train")
    checked = 0
    for example in found:
        value = resolve(example.where)
        if value is not None and inspect.getdoc(value):
            assert example.target == " ".join(inspect.getdoc(value).split("\n\n")[0].split())
            assert len(example.target) < 30 or example.target not in " ".join(example.source.split())
            checked += 1
    assert checked > 50


def test_kinds_are_those_that_inspect_sees(few_modules):
    seen = set()
    for definition in definitions():
        kind, value = kind_of(definition), resolve(definition.name)
        if value is None or kind in ("class", "module", ""):
            continue
        value = getattr(value, "__func__", value)
        if isinstance(value, property):
            assert kind == "property", definition.name
        elif inspect.isfunction(value) and not hasattr(value, "__wrapped__"):
            inside = "." in value.__qualname__
            expected = "generator" if inspect.isgeneratorfunction(value) else "method" if inside else "function"
            if value.__code__.co_name == definition.name.rpartition(".")[2]:
                assert kind == expected, definition.name
        seen.add(kind)
    assert seen == {"function", "generator", "method", "property"}


def test_the_text_of_a_kind_does_not_show_the_line_that_tells(few_modules):
    for example in load_task("python_kinds", size=300).examples("train"):
        name = example.where.rpartition(".")[2]
        assert f"def {name}(" not in example.text or example.label in ("class", "module")
        assert not example.text.startswith(("class ", "@")) or example.label in ("class", "module")
        assert len(example.text) <= 400


def test_defaults_are_those_of_the_signature(few_modules):
    found = load_task("python_defaults", size=200).examples("train")
    checked = 0
    for example in found:
        (text, start), parameter = example.answers[0], example.id.rpartition(".")[2]
        assert example.question == f"What is the default of parameter {parameter}?"
        assert example.context[start : start + len(text)] == text
        value = resolve(example.where)
        value = getattr(value, "__func__", value)
        if inspect.isfunction(value):
            try:
                expected = ast.literal_eval(text)
            except ValueError:  # an expression
                continue
            assert inspect.signature(value).parameters[parameter].default == expected
            checked += 1
    assert checked > 40


def test_defaults_of_every_kind_of_parameter_are_found():
    code = "@d(x=5)\ndef f(a, b=1, /, c=(2,\n      3), *args, e, g='x', **kw):\n    pass"
    assert [(n, t) for n, t, _ in defaults(code)] == [("b", "1"), ("c", "(2,\n      3)"), ("g", "'x'")]
    assert all(code[at : at + len(text)] == text for _, text, at in defaults(code))


def test_identifiers_are_tagged_as_by_hand():
    code = "def scale(values, factor=2):\n    out = [v.x * factor for v in values]  # why\n    return max(out, key=f)\n"
    assert tag_tokens(code) == [
        *[("def", "keyword"), ("scale", "definition"), ("(", "other"), ("values", "parameter"), (",", "other")],
        *[("factor", "parameter"), ("=", "other"), ("2", "other"), (")", "other"), (":", "other")],
        *[("out", "local"), ("=", "other"), ("[", "other"), ("v", "local"), (".", "other"), ("x", "attribute")],
        *[("*", "other"), ("factor", "parameter"), ("for", "keyword"), ("v", "local"), ("in", "keyword")],
        *[("values", "parameter"), ("]", "other"), ("return", "keyword"), ("max", "builtin"), ("(", "other")],
        *[("out", "local"), (",", "other"), ("key", "argument"), ("=", "other"), ("f", "other"), (")", "other")],
    ]
    assert tag_tokens("def f():\n    return 'a long text with spaces'\n")[-1] == ('"..."', "other")
    assert tag_tokens("def f(x):\n    return f'{x}'\n") is None
    assert tag_tokens("def f(:") is None


@pytest.mark.slow
def test_the_whole_library_gives_sets_of_their_size_in_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_JAX_CACHE", str(tmp_path))
    load_task("python_defaults").examples("valid")
    for name, least in zip(TASKS, (3500, 2500, 2300, 1500, 2300, 2300), strict=True):
        began = time.process_time()
        task = load_task(name)
        found = {split: task.examples(split) for split in ("train", "valid", "test")}
        assert time.process_time() - began < 30
        texts = [{e.document for e in items} for items in found.values()]
        assert len(set.union(*texts)) == sum(map(len, found.values()))
        assert least < len(found["train"]) <= 4000 and min(map(len, found.values())) > 150
