"""Examples: one frozen dataclass per kind, each of which knows what is wrong with it and what a right answer is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from gpt_jax.errors import nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """What every kind of example has.

    Attributes:
      where: "file:line" (or what names the document), for messages.
      group: part of the task that it belongs to ("qa3"); scores are then given by group too. "" is none.
    """

    kind: ClassVar[str] = ""
    where: str = ""
    group: str = ""

    def problem(self, labels: Sequence[str]) -> str:
        """Returns what is wrong with the example, given the task's labels (none: any), or ''."""
        raise NotImplementedError

    @property
    def gold(self):
        """What a prediction is compared with: see `gpt_jax.tasks.metrics`."""
        raise NotImplementedError

    @property
    def document(self) -> str:
        """The text by whose hash examples are held out: those that share it are in one split."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Classify(Example):
    """A text, or a pair of texts, and the name of its class."""

    kind: ClassVar[str] = "classify"
    text: str
    label: str
    text_b: str = ""

    def problem(self, labels: Sequence[str]) -> str:
        found = _bad_text("text", self.text) or _unwritable("text_b", self.text_b)
        return found or _bad_label("label", self.label, labels)

    @property
    def gold(self) -> str:
        return self.label

    @property
    def document(self) -> str:
        return f"{self.text}\n{self.text_b}"


@dataclasses.dataclass(frozen=True)
class TextToText(Example):
    """A prompt and the text that should follow it.

    Attributes:
      source: the whole prompt, template applied; it ends where the target begins.
      target: the text to learn to generate.
      references: every acceptable text; the target if not given.
    """

    kind: ClassVar[str] = "text_to_text"
    source: str
    target: str
    references: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "references", tuple(self.references) or (self.target,))

    def problem(self, labels: Sequence[str]) -> str:
        if self.target not in self.references:
            return "the target is not among the references"
        found = _bad_text("source", self.source) or _bad_text("target", self.target)
        return found or next(filter(None, (_bad_text("a reference", r) for r in self.references)), "")

    @property
    def gold(self) -> tuple[str, ...]:
        return self.references

    @property
    def document(self) -> str:
        return self.source


@dataclasses.dataclass(frozen=True)
class Tagged(Example):
    """Words and a tag for each."""

    kind: ClassVar[str] = "tag"
    words: tuple[str, ...]
    tags: tuple[str, ...]

    def problem(self, labels: Sequence[str]) -> str:
        if not self.words:
            return "no words"
        if len(self.words) != len(self.tags):
            return f"{len(self.words)} words but {len(self.tags)} tags"
        found = next(filter(None, (_bad_text("a word", word) for word in self.words)), "")
        return found or next(filter(None, (_bad_label("tag", tag, labels) for tag in self.tags)), "")

    @property
    def gold(self) -> tuple[str, ...]:
        return self.tags

    @property
    def document(self) -> str:
        return " ".join(self.words)


@dataclasses.dataclass(frozen=True)
class SpanQA(Example):
    """A question whose answers are spans of the context.

    Attributes:
      id: of the question. answers: (text, first character in the context) of each accepted span.
    """

    kind: ClassVar[str] = "span_qa"
    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]

    def problem(self, labels: Sequence[str]) -> str:
        found = _bad_text("question", self.question) or _bad_text("context", self.context)
        if found:
            return found
        if not self.answers:
            return "no answer"
        for text, start in self.answers:
            if not text.strip():
                return "empty answer"
            if start < 0 or self.context[start : start + len(text)] != text:
                at = self.context.find(text)
                found = f"it stands at {at}" if at >= 0 else "nor anywhere in it"
                return f"answer {_short(text)} is not at character {start} of the context ({found})"
        return ""

    @property
    def gold(self) -> tuple[str, ...]:
        return tuple(text for text, _ in self.answers)

    @property
    def document(self) -> str:
        return self.context


@dataclasses.dataclass(frozen=True)
class MultipleChoice(Example):
    """A prompt, its possible continuations, and which is right (from 0)."""

    kind: ClassVar[str] = "multiple_choice"
    prompt: str
    choices: tuple[str, ...]
    answer: int

    def problem(self, labels: Sequence[str]) -> str:
        if len(self.choices) < 2:
            return f"{len(self.choices)} choices; at least 2 are needed"
        if not 0 <= self.answer < len(self.choices):
            return f"answer {self.answer} is not one of the choices 0 to {len(self.choices) - 1}"
        found = _bad_text("prompt", self.prompt)
        return found or next(filter(None, (_bad_text("a choice", choice) for choice in self.choices)), "")

    @property
    def gold(self) -> int:
        return self.answer

    @property
    def document(self) -> str:
        return self.prompt


@dataclasses.dataclass(frozen=True)
class Dialogue(Example):
    """Turns of a conversation, (role, text) each; what is scored is the text of the last one."""

    kind: ClassVar[str] = "dialogue"
    turns: tuple[tuple[str, str], ...]

    def problem(self, labels: Sequence[str]) -> str:
        if not self.turns:
            return "no turns"
        for number, (role, text) in enumerate(self.turns):
            found = _bad_text(f"role of turn {number}", role) or _bad_text(f"text of turn {number}", text)
            if found or _bad_label("role", role, labels):
                return found or _bad_label("role", role, labels)
        return ""

    @property
    def gold(self) -> tuple[str, ...]:
        return (self.turns[-1][1],)

    @property
    def document(self) -> str:
        return self.turns[0][1] if self.turns else ""


@dataclasses.dataclass(frozen=True)
class Preference(Example):
    """A prompt and two answers to it, the better one first."""

    kind: ClassVar[str] = "preference"
    prompt: str
    chosen: str
    rejected: str

    def problem(self, labels: Sequence[str]) -> str:
        if self.chosen == self.rejected:
            return "the chosen and the rejected answer are the same"
        texts = {"prompt": self.prompt, "chosen answer": self.chosen, "rejected answer": self.rejected}
        return next(filter(None, (_bad_text(what, text) for what, text in texts.items())), "")

    @property
    def gold(self) -> int:
        return 0

    @property
    def document(self) -> str:
        return self.prompt


KINDS: dict[str, type[Example]] = {
    cls.kind: cls for cls in (Classify, TextToText, Tagged, SpanQA, MultipleChoice, Dialogue, Preference)
}


@dataclasses.dataclass(frozen=True)
class Malformed:
    """What a reader yields in the place of a row that is no example; the task decides whether it is fatal."""

    where: str
    why: str


def _bad_text(what: str, text: str) -> str:
    if not text.strip():
        return f"{what} is empty" if what.startswith("a ") else f"empty {what}"
    return _unwritable(what, text)


def _unwritable(what: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return f"{what} holds half a surrogate pair, which no UTF-8 has"
    return ""


def _bad_label(what: str, label: str, labels: Sequence[str]) -> str:
    if label in labels or (not labels and label.strip()):
        return ""
    if not label.strip():
        return f"empty {what}"
    shown = ", ".join(labels[:12]) + ", ..." * (len(labels) > 12)
    return f"{what} {_short(label)} is unknown{nearest(label, labels)}; allowed: {shown}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
