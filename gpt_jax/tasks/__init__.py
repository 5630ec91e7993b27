"""Tasks: data, template and metrics of a supervised problem, declared in one file each. Host code, without jax."""

from gpt_jax.tasks.base import (
    Classify,
    Dialogue,
    Example,
    Malformed,
    MultipleChoice,
    Preference,
    SpanQA,
    Tagged,
    Task,
    TextToText,
    load_task,
)

__all__ = [
    "Classify",
    "Dialogue",
    "Example",
    "Malformed",
    "MultipleChoice",
    "Preference",
    "SpanQA",
    "Tagged",
    "Task",
    "TextToText",
    "load_task",
]
