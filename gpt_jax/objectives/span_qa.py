"""Span question answering: pointers to an answer's first and last token in a context (Devlin et al. 2019, 4.2).

A row is EOT question sep window cls: long contexts are read through windows, each `doc_stride` tokens after the last.
The pointers are softmaxes over the tokens of the window and `cls`, which stands for "not in this window". A prediction
is the most likely span over all windows of an example, never `cls`, as text of the context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gpt_jax.data.formats import Arrays, Row, TaskInfo
from gpt_jax.errors import UserError, choose
from gpt_jax.losses import cross_entropy
from gpt_jax.model import Transformer
from gpt_jax.model.random import fold_name
from gpt_jax.objectives.base import Batch, Host, Objective, Params, check_options
from gpt_jax.objectives.heads import apply_linear, check_dropout, hidden_states, init_linear
from gpt_jax.options import option

HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Context:
    """A context in tokens.

    Attributes:
      ids: [n]. first, last: character that a token's first and last byte is of, [n] each: a token may begin or end
        inside a character.
    """

    ids: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def tokens_of(self, start: int, end: int) -> tuple[int, int]:
        """Returns the first and the last token of the characters [start, end)."""
        return int(np.searchsorted(self.last, start, "left")), int(np.searchsorted(self.first, end, "left")) - 1

    def characters_of(self, first: int, last: int) -> tuple[int, int]:
        """Returns the characters [start, end) that tokens first to last, inclusive, have bytes of."""
        return int(self.first[first]), int(self.last[last]) + 1


def encode_context(text: str, tokenizer: Any, where: str = "") -> Context:
    """Returns the tokens of a text and which characters they are of; raises UserError if they do not spell the text."""
    ids = tokenizer.encode(text)
    spelled = [tokenizer.token_bytes(token) for token in ids.tolist()]
    raw = text.encode("utf-8")
    if b"".join(spelled) != raw:
        raise UserError(
            f"the tokenizer does not keep the text of {where or 'a context'} as it is, so answers have no place in it; "
            "span_qa needs a lossless one (data.tokenizer.unknown='bytes')."
        )
    begins = (np.frombuffer(raw, np.uint8) & 0xC0) != 0x80  # the first byte of each character
    character = np.cumsum(begins) - 1
    ends = np.cumsum([len(piece) for piece in spelled])
    starts = np.concatenate([[0], ends[:-1]])
    return Context(ids, character[starts], character[ends - 1])


@dataclasses.dataclass(frozen=True)
class SpanRows:
    """A row per window (an ExampleRows). Questions lose what is beyond `max_question` tokens.

    Attributes:
      stride: tokens from a window to the next, no more than a window has.
    """

    eot: int
    sep: int
    cls: int
    length: int
    stride: int
    max_question: int
    kind: str = "span_qa"
    pack: bool = False
    generates: bool = False

    @property
    def arrays(self) -> Arrays:
        tokens = {name: ((self.length,), np.int32) for name in ("tokens", "segment_ids", "positions")}
        rows = {"start": ((), np.int32), "end": ((), np.int32), "row_weights": ((), np.float32)}
        return {**tokens, "pointable": ((self.length,), np.bool_), **rows}

    def question(self, example: Any, tokenizer: Any) -> list[int]:
        """Returns EOT question sep."""
        kept = min(self.max_question, (self.length - 3) // 2)
        return [self.eot, *tokenizer.encode(example.question).tolist()[:kept], self.sep]

    def windows(self, tokens: int, before: int) -> list[tuple[int, int]]:
        """Returns the ranges [from, to) of a context's tokens in its rows, the context from column `before` on."""
        room = self.length - before - 1
        step = min(self.stride, room)
        return [(at, min(at + room, tokens)) for at in range(0, max(tokens - room + step, 1), step)]

    def encode(self, example: Any, task: TaskInfo, tokenizer: Any) -> list[Row]:
        question = self.question(example, tokenizer)
        context = encode_context(example.context, tokenizer, example.where)
        spans = [context.tokens_of(start, start + len(text)) for text, start in example.answers]
        before, rows = len(question), []
        for begin, end in self.windows(len(context.ids), before):
            ids = [*question, *context.ids[begin:end].tolist(), self.cls]
            inside = [(first, last) for first, last in spans if begin <= first and last < end]
            shift = before - begin
            start, stop = (inside[0][0] + shift, inside[0][1] + shift) if inside else (len(ids) - 1, len(ids) - 1)
            rows.append(
                {
                    "tokens": np.array(ids, np.int32),
                    "segment_ids": np.ones(len(ids), np.int32),
                    "positions": np.arange(len(ids), dtype=np.int32),
                    "pointable": np.arange(len(ids)) >= before,
                    "start": np.int32(start),
                    "end": np.int32(stop),
                    "row_weights": np.float32(1.0),
                }
            )
        return rows

    def predictions(self, outputs: Mapping[str, np.ndarray], encoded: Any) -> list[str]:
        """The text of each example's best span; see `SpanQA.predict`."""
        bounds = np.searchsorted(encoded.owners, np.arange(len(encoded.examples) + 1))
        out = []
        for example, begin, end in zip(encoded.examples, bounds[:-1], bounds[1:], strict=True):
            best = begin + int(np.argmax(outputs["score"][begin:end]))
            before = len(self.question(example, encoded.tokenizer))
            context = encode_context(example.context, encoded.tokenizer, example.where)
            shift = self.windows(len(context.ids), before)[best - begin][0] - before
            first, last = context.characters_of(outputs["start"][best] + shift, outputs["end"][best] + shift)
            out.append(example.context[first:last].strip())
        return out


def best_spans(start_BxT: Array, end_BxT: Array, longest: int) -> tuple[Array, Array, Array]:
    """Returns (score, first, last), [B] each, of the spans with first <= last < first + longest and the largest
    start[first] + end[last]; of several the one that begins first, then the shortest."""
    T = start_BxT.shape[1]
    padded = jnp.pad(end_BxT, ((0, 0), (0, longest)), constant_values=2 * HIDDEN)

    def longer(best: tuple[Array, Array], offset: Array) -> tuple[tuple[Array, Array], None]:
        score = start_BxT + lax.dynamic_slice_in_dim(padded, offset, T, axis=1)
        better = score > best[0]
        return (jnp.where(better, score, best[0]), jnp.where(better, offset, best[1])), None

    worst = (jnp.full(start_BxT.shape, -jnp.inf), jnp.zeros(start_BxT.shape, jnp.int32))
    (score_BxT, offset_BxT), _ = lax.scan(longer, worst, jnp.arange(min(longest, T)))
    first = jnp.argmax(score_BxT, axis=1)
    score, offset = (jnp.take_along_axis(x, first[:, None], axis=1)[:, 0] for x in (score_BxT, offset_BxT))
    return score, first, first + offset


@dataclasses.dataclass(frozen=True)
class SpanQA(Objective):
    """Mean cross-entropy of the two pointers: the term "span_qa"; metrics "span_accuracy" (both right), "span_nll".

    Batch: tokens, segment_ids, positions, pointable (the window and `cls`) [B, T]; start, end, row_weights [B].

    Attributes:
      mask: what the tokens see.
    """

    generates: ClassVar[bool] = False

    model: Transformer
    coefs: Mapping[str, Any] = option({"span_qa": 1.0}, "weight of the term 'span_qa'")
    mask: str = option("bidirectional", "bidirectional | causal")
    doc_stride: int = option(128, "tokens from a window of a long context to the next")
    max_question: int = option(64, "tokens of a question; the rest is cut off")
    max_answer: int = option(30, "tokens of a predicted answer at most")
    head_dropout: float = option(0.0, "rate on what the head reads")

    def __post_init__(self) -> None:
        choose("objective.mask", self.mask, ("bidirectional", "causal"))
        check_dropout(self.head_dropout)
        for name in ("doc_stride", "max_question", "max_answer"):
            if getattr(self, name) < 1:
                raise UserError(f"objective.{name} is {getattr(self, name)}; it must be at least 1.")

    @classmethod
    def rows(cls, options: Mapping[str, Any], host: Host) -> SpanRows:
        own = cls(model=None, **check_options(cls, options))  # for the defaults
        if host.context_length < 5:
            raise UserError(f"context_length is {host.context_length}; span_qa needs at least 5 tokens in a row.")
        ids = (host.special(name) for name in ("eot", "sep", "cls"))
        return SpanRows(*ids, host.context_length, own.doc_stride, own.max_question)

    def init(self, key: Array, batch: Batch) -> Params:
        head = init_linear(fold_name(key, "pointers"), self.model.config, 2, bias=False)
        return {"model": self.model.init(key, batch["tokens"])["params"], "pointers": head}

    def batch_spec(self, batch_size: int, context_length: int) -> Any:
        kinds = dict.fromkeys(("tokens", "segment_ids", "positions"), jnp.int32) | {"pointable": jnp.bool_}
        rows = {"start": jnp.int32, "end": jnp.int32, "row_weights": jnp.float32}
        return {name: jax.ShapeDtypeStruct((batch_size, context_length), kind) for name, kind in kinds.items()} | {
            name: jax.ShapeDtypeStruct((batch_size,), kind) for name, kind in rows.items()
        }

    def prepare(self, batch: Batch, keys: Array, step: Array) -> Batch:
        return {**batch, "weights": {"span_qa": batch["row_weights"]}}

    def loss(self, params: Params, batch: Batch, keys: Array, train: bool) -> tuple[dict, dict]:
        pointers = self._pointers(params, batch, keys if train else None)
        wanted = [batch["start"], batch["end"]]
        loss, nll = (sum(both) / 2 for both in zip(*map(cross_entropy, pointers, wanted), strict=True))
        right = [jnp.argmax(logits, axis=-1) == at for logits, at in zip(pointers, wanted, strict=True)]
        rows = jnp.sum(batch["row_weights"])
        metrics = {
            "span_accuracy": (jnp.sum(batch["row_weights"] * (right[0] & right[1])), rows),
            "span_nll": (jnp.sum(batch["row_weights"] * nll), rows),
        }
        return {"span_qa": jnp.sum(batch["weights"]["span_qa"] * loss)}, metrics

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Each row's best span in its window: its log-probability, and the columns of its first and last token."""
        last = jnp.sum(batch["segment_ids"] > 0, axis=1, keepdims=True) - 1
        window = batch["pointable"] & (jnp.arange(batch["tokens"].shape[1]) != last)
        start, end = (
            jnp.where(window, jax.nn.log_softmax(logits), HIDDEN) for logits in self._pointers(params, batch, None)
        )
        score, first, last = best_spans(start, end, self.max_answer)
        return {"score": score, "start": first, "end": last}

    def _pointers(self, params: Params, batch: Batch, keys: Array | None) -> tuple[Array, Array]:
        """Logits of the first and of the last token, hidden where no pointer may go. [B, T] float32 each."""
        hidden = hidden_states(self.model, params["model"], batch, self.mask, keys)
        logits = apply_linear(params["pointers"], hidden, self.head_dropout, keys)
        start, end = (jnp.where(batch["pointable"], logits[..., i], HIDDEN) for i in range(2))
        return start, end
