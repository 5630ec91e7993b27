"""A task: where its examples come from, what kind they are and how predictions are scored; and how one is named.

    task = load_task("sst2")
    examples = task.examples("train")
    task.score(["positive"] * len(examples), examples)

A task is a function that returns a `Task`; the function's parameters are the task's options. One of your own needs no
fork: `load_task("pkg.mod:function")` or `load_task("file.py:function")`.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gpt_jax.data.readers import local_path
from gpt_jax.data.splits import held_out
from gpt_jax.errors import UserError, choose, nearest
from gpt_jax.options import import_path
from gpt_jax.tasks.examples import (
    KINDS,
    Classify,
    Dialogue,
    Example,
    Malformed,
    MultipleChoice,
    Preference,
    SpanQA,
    Tagged,
    TextToText,
)
from gpt_jax.tasks.metrics import METRICS, compute

__all__ = [
    "REGISTRY",
    "Classify",
    "Dialogue",
    "Example",
    "Malformed",
    "MultipleChoice",
    "Preference",
    "Skipped",
    "SpanQA",
    "Tagged",
    "Task",
    "TextToText",
    "files",
    "load_task",
]

# One line per task; the file it names is all there is to it.
REGISTRY: dict[str, str] = {
    "sst2": "gpt_jax.tasks.sst2:task",
    "ag_news": "gpt_jax.tasks.ag_news:task",
    "wnut17": "gpt_jax.tasks.wnut17:task",
    "squad": "gpt_jax.tasks.squad:task",
    "squad_generate": "gpt_jax.tasks.squad_generate:task",
    "e2e": "gpt_jax.tasks.e2e:task",
    "multi30k": "gpt_jax.tasks.multi30k:task",
    "scitldr": "gpt_jax.tasks.scitldr:task",
    "babi": "gpt_jax.tasks.babi:task",
    "python_docstrings": "gpt_jax.tasks.python_docstrings:task",
    "python_kinds": "gpt_jax.tasks.python_kinds:task",
    "python_identifiers": "gpt_jax.tasks.python_identifiers:task",
    "python_defaults": "gpt_jax.tasks.python_defaults:task",
    "python_choices": "gpt_jax.tasks.python_choices:task",
    "python_dialogue": "gpt_jax.tasks.python_dialogue:task",
    "python_preferences": "gpt_jax.tasks.python_preferences:task",
    "synthetic_arithmetic": "gpt_jax.tasks.synthetic_arithmetic:task",
    "shortened": "gpt_jax.tasks.shortened:task",
    # Files of your own, by kind.
    "classification": "gpt_jax.tasks.generic:classification",
    "text_to_text": "gpt_jax.tasks.generic:text_to_text",
    "parallel": "gpt_jax.tasks.generic:parallel",
    "tagging": "gpt_jax.tasks.generic:tagging",
    "span_qa": "gpt_jax.tasks.generic:span_qa",
    "multiple_choice": "gpt_jax.tasks.generic:multiple_choice",
    "dialogue": "gpt_jax.tasks.generic:dialogue",
    "preferences": "gpt_jax.tasks.generic:preferences",
}
# 'babi:3' is {"name": "babi", "number": 3}.
SHORTHAND = {"babi": "number"}

Split = Callable[[], Iterable["Example | Malformed"]]
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Skipped:
    """How many malformed examples a split left out, and what was wrong with the first few."""

    count: int
    messages: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """Examples by split, and how predictions are scored.

    Attributes:
      name, kind: of the task; kinds are those of `examples.KINDS`.
      labels: names of the classes (classify), of the tags (tag) or of the roles (dialogue); () accepts any.
      metrics: names in `metrics.METRICS`, or import paths of functions (predictions, golds, labels) -> float.
      splits: split -> a function that yields its examples anew, a `Malformed` where one cannot be made.
      malformed: 'error' stops at a malformed example, 'skip' leaves it out and counts it in `skipped`.
      limit, limit_per_class: first so many examples (of each class) of a split, or of the splits a mapping names; 0 is
        all of them.
      skipped: by split, what the last `examples(split)` left out.
    """

    name: str
    kind: str
    metrics: tuple[str, ...]
    splits: Mapping[str, Split]
    labels: tuple[str, ...] = ()
    malformed: str = "error"
    limit: int | Mapping[str, int] = 0
    limit_per_class: int | Mapping[str, int] = 0
    skipped: dict[str, Skipped] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self):
        choose(f"task {self.name}: kind", self.kind, KINDS)
        choose(f"task {self.name}: malformed", self.malformed, ("error", "skip"))
        known = [name for name, (kinds, _) in METRICS.items() if self.kind in kinds]
        for metric in self.metrics:
            if ":" not in metric:
                choose(f"task {self.name}: metric", metric, known)
        for what, value in (("limit", self.limit), ("limit_per_class", self.limit_per_class)):
            for split, n in value.items() if isinstance(value, Mapping) else [("", value)]:
                if split:
                    choose(f"task {self.name}: split of {what}", split, self.splits)
                if not isinstance(n, int) or n < 0:
                    raise UserError(f"task {self.name}: {what} is {n!r}; a number of examples, 0 for all, is needed.")
        if self.limit_per_class and self.kind != "classify":
            raise UserError(f"task {self.name}: limit_per_class needs classes, but its kind is {self.kind!r}.")

    def examples(self, split: str) -> list[Example]:
        """Returns the valid examples of a split, in the order of its data.

        Raises:
          UserError: no such split, no valid example, or a malformed one (file, line and what is wrong with it) where
            `malformed` is 'error'.
        """
        choose(f"split of task {self.name}", split, self.splits)
        limit, per_class = self._limit("limit", split), self._limit("limit_per_class", split)
        found: list[Example] = []
        problems, count = [], 0
        counts: collections.Counter[str] = collections.Counter()
        for item in self.splits[split]():
            problem = item.why if isinstance(item, Malformed) else self._problem(item)
            if problem:
                message = f"{item.where}: {problem}"
                if self.malformed == "error":
                    raise UserError(f"{message} (task {self.name}; malformed='skip' leaves such examples out).")
                count += 1
                problems += [message] if len(problems) < _SHOWN else []
                continue
            if per_class:
                counts[item.label] += 1
                if counts[item.label] > per_class:
                    continue
            found.append(item)
            if (limit and len(found) == limit) or (per_class and len(found) == per_class * len(self.labels)):
                break
        self.skipped[split] = Skipped(count, tuple(problems))
        if not found:
            why = f"{count} are malformed, the first: {problems[0]}" if problems else "its data is empty"
            raise UserError(f"task {self.name} has no example in split {split!r}: {why}.")
        return found

    def score(self, predictions: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        """Returns each metric, and each by group ('accuracy/qa3') if the examples have groups.

        Args:
          predictions: one per example: the label's name (classify), the generated text (text_to_text, dialogue), a
            sequence of tags (tag), the text of the answer (span_qa), the index of the choice (multiple_choice).

        Raises:
          UserError: unequal numbers, or a library that is not installed.
        """
        if len(predictions) != len(examples):
            raise UserError(f"task {self.name}: {len(predictions)} predictions for {len(examples)} examples.")
        if not examples:
            raise UserError(f"task {self.name}: there is nothing to score.")
        groups = collections.defaultdict(list)
        for prediction, example in zip(predictions, examples, strict=True):
            groups[""].append((prediction, example.gold))
            if example.group:
                groups[f"/{example.group}"].append((prediction, example.gold))
        return {
            f"{metric.rpartition(':')[2]}{group}": compute(metric, self.kind, *zip(*pairs, strict=True), self.labels)
            for group, pairs in groups.items()
            for metric in self.metrics
        }

    def _problem(self, item: Example) -> str:
        if not isinstance(item, KINDS[self.kind]):
            return f"a {type(item).__name__} in a task of kind {self.kind!r}"
        return item.problem(self.labels)

    def _limit(self, name: str, split: str) -> int:
        value = getattr(self, name)
        return value.get(split, 0) if isinstance(value, Mapping) else value


_COMMON = ("malformed", "limit", "limit_per_class")


def load_task(spec: str | Mapping[str, Any], **options: Any) -> Task:
    """Returns the task that a name or a table names.

    Args:
      spec: a name of REGISTRY ('sst2'), 'package.module:function', 'file.py:function' (or a Task's name in place of the
        function's), or a mapping {"name": any of these, options...}.
      options: the task's own and `malformed`, `limit`, `limit_per_class`; they win over the mapping's.

    Raises:
      UserError: an unknown name or option, with the closest; a file or module that cannot be had.
    """
    name, given = _named(spec, options)
    declared = _find(name)
    if isinstance(declared, Task):
        allowed, required = {}, []
    elif not callable(declared):
        raise UserError(f"task {name} is a {type(declared).__name__}, neither a Task nor a function that returns one.")
    else:
        allowed = inspect.signature(declared).parameters
        required = [p.name for p in allowed.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    known = dict.fromkeys([*allowed, *_COMMON])
    for key in given:
        if key not in known:
            raise UserError(f"task {name} has no option {key!r}{nearest(key, known)}; it takes: {', '.join(known)}.")
    for key in required:
        if key not in given:
            raise UserError(f"task {name} needs the option {key!r}; it takes: {', '.join(known)}.")
    common = {key: given.pop(key) for key in _COMMON if key in given and key not in allowed}
    task = declared if isinstance(declared, Task) else declared(**given)
    if not isinstance(task, Task):
        raise UserError(f"task {name} returned a {type(task).__name__}, not a gpt_jax.tasks.Task.")
    return dataclasses.replace(task, **common, skipped={})


def parse_specs(text: str, flag: str) -> list[Any]:
    """Returns the names and tables that a flag's text gives: names, comma-separated, or a literal.

    Args:
      text: "sst2,squad", "{'name': 'sst2', 'limit': 100}" or "['squad', {'name': 'sst2', 'limit': 100}]".
    """
    if not text.lstrip().startswith(("{", "[", "(")):
        return [name.strip() for name in text.split(",") if name.strip()]
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError):
        found = None
    specs = list(found) if isinstance(found, (list, tuple)) else [found]
    if not all(isinstance(spec, str) or (isinstance(spec, Mapping) and "name" in spec) for spec in specs):
        raise UserError(f"{flag} {text!r} is no table such as {{'name': 'sst2', 'limit': 100}}, nor a list of them.")
    return specs


def task_paths(spec: str | Mapping[str, Any], splits: Sequence[str]) -> list[str]:
    """Returns the paths that a task reads some splits from, as far as its options say so; nothing is opened.

    The options are those called like a split, and `path`; a file that declares the task is one as well.
    """
    name, given = _named(spec, {})
    declared, head = _find(name), name.rpartition(":")[0]
    parameters = {} if isinstance(declared, Task) else inspect.signature(declared).parameters
    options = {p.name: p.default for p in parameters.values()} | given
    found = [options[key] for key in (*splits, "path") if isinstance(options.get(key), str)]
    inner = options.get("task")  # a task that is made of another
    if isinstance(inner, (str, Mapping)):
        found += task_paths(inner, splits)
    return [path for path in (*found, head if head.endswith(".py") else "") if path]


def _named(spec: str | Mapping[str, Any], options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, options) of a task."""
    given = {} if isinstance(spec, str) else dict(spec)
    name = spec if isinstance(spec, str) else given.pop("name", "")
    return _expand_shorthand(name, given | dict(options))


def _expand_shorthand(name: str, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    head, _, value = name.partition(":")
    if head not in SHORTHAND or not value:
        return name, given
    if not value.isdecimal():
        raise UserError(f"task {name!r}: {value!r} is no number; {head}:3, for example, is meant.")
    return head, {SHORTHAND[head]: int(value), **given}


def _find(name: str) -> Callable[..., Task] | Task:
    if name in REGISTRY:
        return import_path(REGISTRY[name])
    head, _, member = name.rpartition(":")
    if head.endswith(".py"):
        return _from_file(local_path(head), member)
    if head:
        return import_path(name)
    raise UserError(
        f"unknown task {name!r}{nearest(name, REGISTRY)}; allowed: {', '.join(REGISTRY)}, "
        "an import path (package.module:function) or a file (tasks.py:function)."
    )


def _from_file(path: pathlib.Path, member: str) -> Any:
    if not path.is_file():
        raise UserError(f"task file {str(path)!r}: no such file.")
    spec = importlib.util.spec_from_file_location(f"gpt_jax_task_file_{path.stem}", path)
    # Registered, since dataclasses and pickle look there; under a name of its own, since it may be called json.py.
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}.") from None
    names = [n for n, value in vars(module).items() if callable(value) or isinstance(value, Task)]
    if not hasattr(module, member):
        raise UserError(f"task file {path} declares no {member!r}{nearest(member, names)}.")
    return getattr(module, member)


def files(read: Callable[..., Iterable[Example | Malformed]], hold_out: float = 0.0, **paths: str) -> dict[str, Split]:
    """Returns the splits of files: {split: read(path)} for every path that is not empty.

    Args:
      read: yields the examples of a path, in which ~ and $VARS are expanded (when the split is read); what is at a URL
        is copied into the cache.
      hold_out: if > 0 and `valid` has no path, about so large a part of `train` is `valid`, by the hash of each
        example's `document`.
      paths: of train, valid, test and any other.
    """

    def split(path: str, keep: Callable[[Example], bool] | None = None) -> Split:
        def examples() -> Iterable[Example | Malformed]:
            for item in read(local_path(path)):
                # A malformed one belongs to train, so that it is counted once.
                if keep is None or keep(item):
                    yield item

        return examples

    def is_valid(item: Example | Malformed) -> bool:
        return not isinstance(item, Malformed) and held_out(item.document, hold_out)

    splits = {name: split(path) for name, path in paths.items() if path}
    if hold_out > 0 and "train" in splits and "valid" not in splits:
        parts = {"train": lambda item: not is_valid(item), "valid": is_valid}
        splits = {**splits, **{name: split(paths["train"], keep) for name, keep in parts.items()}}
    order = ["train", "valid", *paths]
    return {name: splits[name] for name in sorted(splits, key=order.index)}
