"""Multiple choice: a scalar head scores each continuation of a prompt; softmax over them (Radford et al. 2018, 3.3).

Each choice is a sequence of its own, EOT prompt sep choice cls, read by the model alone; the head reads at `cls`, which
has seen all of it under the causal mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.data.formats import Arrays, Row, TaskInfo
from gpt_jax.errors import UserError, choose
from gpt_jax.losses import cross_entropy
from gpt_jax.model import Transformer
from gpt_jax.model.random import fold, fold_name
from gpt_jax.objectives.base import Batch, Host, Objective, Params, check_options
from gpt_jax.objectives.heads import apply_linear, check_dropout, hidden_states, init_linear
from gpt_jax.options import option

HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class ChoiceRows:
    """A row of `choices` sequences per example (an ExampleRows): what is too long loses the end of the choice beyond
    half a sequence, then the beginning of the prompt, whose end the choice continues."""

    eot: int
    sep: int
    cls: int
    length: int
    choices: int
    kind: str = "multiple_choice"
    pack: bool = False
    generates: bool = False

    @property
    def arrays(self) -> Arrays:
        names = ("tokens", "segment_ids", "positions")
        tokens = {name: ((self.choices, self.length), np.int32) for name in names}
        rows = {"answer": ((), np.int32), "row_weights": ((), np.float32)}
        return {**tokens, "choice_mask": ((self.choices,), np.bool_), **rows}

    def encode(self, example: Any, task: TaskInfo, tokenizer: Any) -> list[Row]:
        if len(example.choices) > self.choices:
            raise UserError(
                f"{example.where or task.name}: an example has {len(example.choices)} choices; "
                f"objective.max_choices is {self.choices}."
            )
        prompt, room = tokenizer.encode(example.prompt).tolist(), self.length - 3
        names = ("tokens", "segment_ids", "positions")
        row = {name: np.zeros((len(example.choices), self.length), np.int32) for name in names}
        for number, text in enumerate(example.choices):
            choice = tokenizer.encode(text).tolist()[: max(room - len(prompt), room // 2)]
            ids = [self.eot, *prompt[max(0, len(prompt) + len(choice) - room) :], self.sep, *choice, self.cls]
            row["tokens"][number, : len(ids)] = ids
            row["segment_ids"][number, : len(ids)] = 1
            row["positions"][number, : len(ids)] = np.arange(len(ids))
        there = np.ones(len(example.choices), np.bool_)
        return [{**row, "choice_mask": there, "answer": np.int32(example.answer), "row_weights": np.float32(1.0)}]

    def predictions(self, outputs: Mapping[str, np.ndarray], encoded: Any) -> list[int]:
        return outputs["answer"].tolist()


@dataclasses.dataclass(frozen=True)
class MultipleChoice(Objective):
    """Cross-entropy of the right choice: the term "multiple_choice"; metrics "accuracy" and "multiple_choice_nll".

    Batch: tokens, segment_ids, positions [B, C, T]; choice_mask [B, C]; answer, row_weights [B].

    Attributes:
      mask: what the tokens see.
    """

    generates: ClassVar[bool] = False

    model: Transformer
    coefs: Mapping[str, Any] = option({"multiple_choice": 1.0}, "weight of the term 'multiple_choice'")
    max_choices: int = option(4, "choices of an example at most; every row has room for so many")
    mask: str = option("causal", "causal | bidirectional")
    head_dropout: float = option(0.0, "rate on what the head reads")

    def __post_init__(self) -> None:
        choose("objective.mask", self.mask, ("causal", "bidirectional"))
        check_dropout(self.head_dropout)
        if self.max_choices < 2:
            raise UserError(f"objective.max_choices is {self.max_choices}; it must be at least 2.")

    @classmethod
    def rows(cls, options: Mapping[str, Any], host: Host) -> ChoiceRows:
        own = cls(model=None, **check_options(cls, options))  # for the defaults
        if host.context_length < 5:
            raise UserError(f"context_length is {host.context_length}; multiple choice needs at least 5 tokens a row.")
        ids = (host.special(name) for name in ("eot", "sep", "cls"))
        return ChoiceRows(*ids, host.context_length, own.max_choices)

    def init(self, key: Array, batch: Batch) -> Params:
        head = init_linear(fold_name(key, "scorer"), self.model.config, 1, bias=False)
        return {"model": self.model.init(key, batch["tokens"][:, 0])["params"], "scorer": head}

    def batch_spec(self, batch_size: int, context_length: int) -> Any:
        choices = (batch_size, self.max_choices)
        tokens = jax.ShapeDtypeStruct((*choices, context_length), jnp.int32)
        return {name: tokens for name in ("tokens", "segment_ids", "positions")} | {
            "choice_mask": jax.ShapeDtypeStruct(choices, jnp.bool_),
            "answer": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
            "row_weights": jax.ShapeDtypeStruct((batch_size,), jnp.float32),
        }

    def prepare(self, batch: Batch, keys: Array, step: Array) -> Batch:
        return {**batch, "weights": {"multiple_choice": batch["row_weights"]}}

    def loss(self, params: Params, batch: Batch, keys: Array, train: bool) -> tuple[dict, dict]:
        logits = self._logits(params, batch, keys if train else None)
        loss, nll = cross_entropy(logits, batch["answer"])
        rows = jnp.sum(batch["row_weights"])
        right = jnp.argmax(logits, axis=-1) == batch["answer"]
        metrics = {
            "accuracy": (jnp.sum(batch["row_weights"] * right), rows),
            "multiple_choice_nll": (jnp.sum(batch["row_weights"] * nll), rows),
        }
        return {"multiple_choice": jnp.sum(batch["weights"]["multiple_choice"] * loss)}, metrics

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        return {"answer": jnp.argmax(self._logits(params, batch, None), axis=-1)}

    def _logits(self, params: Params, batch: Batch, keys_B: Array | None) -> Array:
        """Scores of the choices, those that are not there hidden. [B, C] float32."""
        B, C, T = batch["tokens"].shape
        sequences = {name: batch[name].reshape(B * C, T) for name in ("tokens", "segment_ids", "positions")}
        keys = None if keys_B is None else jnp.stack([fold(keys_B, c) for c in range(C)], axis=1).reshape(B * C)
        hidden = hidden_states(self.model, params["model"], sequences, self.mask, keys)
        last = jnp.maximum(jnp.sum(sequences["segment_ids"] > 0, axis=1) - 1, 0)
        at_cls = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        logits = apply_linear(params["scorer"], at_cls, self.head_dropout, keys).reshape(B, C)
        return jnp.where(batch["choice_mask"], logits, HIDDEN)
