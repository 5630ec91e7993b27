"""Any task of gpt_jax.tasks in zero- and few-shot form: a frame around each example, words for its labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt_jax.benchmarks.base import Benchmark, Item
from gpt_jax.errors import UserError, choose
from gpt_jax.tasks.base import load_task
from gpt_jax.tasks.examples import Classify, Dialogue, Example, MultipleChoice, SpanQA, TextToText

# By name of the task: what is asked of a text, and words for labels that are none.
FRAMES = {
    "sst2": "Review: {text}\nSentiment:",
    "ag_news": "{text}\nTopic:",
}
LABELS = {"ag_news": {"Sci/Tech": "Technology"}}
_FRAME = "{text}\nAnswer:"


def few_shot(spec: str | Mapping[str, Any], split: str = "") -> Benchmark:
    """Returns the benchmark of a task; demonstrations come from its split 'train'.

    Args:
      spec: as `load_task` takes it. split: what is scored; '': 'test', or 'valid' where there is none.

    Raises:
      UserError: a kind of task that has no such form, a split that it has not.
    """
    task = load_task(spec)
    scored = choose(f"split of task {task.name}", split or ("test" if "test" in task.splits else "valid"), task.splits)
    if task.kind not in _MAKERS:
        raise UserError(f"a task of kind {task.kind!r} has no few-shot form; those that have: {', '.join(_MAKERS)}.")
    make: Callable[[Any, Any], Item] = _MAKERS[task.kind]
    generates = task.kind not in ("classify", "multiple_choice")

    def items(which: str) -> list[Item]:
        return [make(task, example) for example in task.examples(which)]

    def score(predictions: Sequence[Any], found: Sequence[Item]) -> dict[str, float]:
        if task.kind == "classify":
            names = _labels(task)
            predictions = [names[index] for index in predictions]
        return task.score(predictions, [item.example for item in found])

    return Benchmark(
        name=task.name,
        kind="generate" if generates else "choice",
        items=lambda: items(scored),
        train=(lambda: items("train")) if "train" in task.splits else None,
        max_tokens=64 if task.kind in ("text_to_text", "dialogue") else 24,
        score=score,
        split=scored,
    )


def _labels(task: Any) -> list[str]:
    if not task.labels:
        raise UserError(f"task {task.name} names no labels to choose from.")
    return list(task.labels)


def _classify(task: Any, example: Classify) -> Item:
    names = _labels(task)
    words = [LABELS.get(task.name, {}).get(name, name).replace("_", " ") for name in names]
    text = "\n".join(filter(None, (example.text, example.text_b)))
    context = FRAMES.get(task.name, _FRAME).replace("{text}", text)
    return _item(context, [f" {word}" for word in words], names.index(example.label), example)


def _multiple_choice(task: Any, example: MultipleChoice) -> Item:
    between = "\n" if example.prompt.endswith("\n") else " "
    return _item(example.prompt.rstrip(), [between + choice for choice in example.choices], example.answer, example)


def _text_to_text(task: Any, example: TextToText) -> Item:
    return _item(example.source, [example.target], 0, example)


def _span_qa(task: Any, example: SpanQA) -> Item:
    context = f"{example.context}\nQuestion: {example.question}\nAnswer:"
    return _item(context, [f" {example.answers[0][0]}"], 0, example)


def _dialogue(task: Any, example: Dialogue) -> Item:
    *before, (role, text) = example.turns
    context = "".join(f"{name}: {said}\n" for name, said in before) + f"{role}:"
    return _item(context, [f" {text}"], 0, example)


def _item(context: str, options: Sequence[str], answer: int, example: Example) -> Item:
    return Item(context, tuple(options), answer, group=example.group, document=example.document, example=example)


_MAKERS: dict[str, Callable[[Any, Any], Item]] = {
    "classify": _classify,
    "multiple_choice": _multiple_choice,
    "text_to_text": _text_to_text,
    "span_qa": _span_qa,
    "dialogue": _dialogue,
}
