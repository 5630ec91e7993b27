"""Supervised text to text (instruction tuning): predict the target after its prompt; the loss is on the target only.

An example is one sequence, EOT prompt target EOT: the loss of its target tokens and of the EOT that ends them sums to
-log P(target | prompt). Examples are packed into rows; attention and positions stay inside each.

With `mask='prefix'` the tokens of a prompt see each other (bidirectional over the input, causal over the output): the
encoder and decoder of the article in one stack, and why there is no separate encoder here: the same weights serve
both, and pre-training on plain text serves them as it is (Raffel et al. 2020, section 3.2, "prefix LM").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.data.formats import Arrays, Row, TaskInfo
from gpt_jax.errors import UserError, choose
from gpt_jax.model import Mask, Transformer
from gpt_jax.objectives.base import Batch, Host, Objective, Params, check_options
from gpt_jax.objectives.text import token_losses
from gpt_jax.options import option

MASKS = ("causal", "prefix")


def cut_prompt(prompt: list[int], room: int) -> list[int]:
    """Cuts a prompt to `room` tokens, at least 1: its beginning goes, but for the EOT, in training and generation."""
    return prompt if len(prompt) <= room else [*prompt[:1], *prompt[len(prompt) - room + 1 :]]


@dataclasses.dataclass(frozen=True)
class PromptRows:
    """Rows of prompts and targets (an ExampleRows).

    Attributes:
      eot: id of the end of a text. length: T. loss_on: 'target' or 'all'. max_new: tokens generated at most.
      bidirectional: the tokens of a prompt see each other.
    """

    eot: int
    length: int
    loss_on: str
    max_new: int
    bidirectional: bool
    kind: str = "text_to_text"
    pack: bool = True
    generates: bool = True

    @property
    def arrays(self) -> Arrays:
        kinds = {"tokens": np.int32, "targets": np.int32, "target_weights": np.float32, "prefix": np.bool_}
        return {name: ((self.length,), kind) for name, kind in kinds.items()}

    def prompt(self, example: Any, tokenizer: Any) -> list[int]:
        """Returns EOT prompt: prompt and target are tokenized apart, so that generation begins where training did."""
        return [self.eot, *tokenizer.encode(example.source).tolist()]

    def encode(self, example: Any, task: TaskInfo, tokenizer: Any) -> list[Row]:
        target = [*tokenizer.encode(example.target).tolist(), self.eot]
        return [self.row(self.prompt(example, tokenizer), target)]

    def row(self, prompt: list[int], target: list[int], wanted: Sequence[bool] | None = None) -> Row:
        """Lays a prompt and its target out; what does not fit is cut: the target's end beyond half a row, then the
        prompt's beginning (but for the EOT). `wanted` says which of prompt and target are predicted; None: the target.
        """
        whole = len(prompt) + len(target)
        wanted = np.arange(whole) >= len(prompt) if wanted is None else np.asarray(wanted)
        first = len(prompt)
        target = target[: max(self.length + 1 - len(prompt), (self.length + 1) // 2)]
        room = self.length + 1 - len(target)
        prompt = cut_prompt(prompt, room)
        kept = np.concatenate([wanted[:1], wanted[first - len(prompt) + 1 : first + len(target)]])
        ids = np.array([*prompt, *target], np.int32)
        predicted = kept[1:]
        return {
            "tokens": ids[:-1],
            "targets": ids[1:],
            "target_weights": np.where(predicted, 1.0, float(self.loss_on == "all")).astype(np.float32),
            "prefix": np.arange(len(ids) - 1) < len(prompt),
        }


@dataclasses.dataclass(frozen=True)
class Supervised(Objective):
    """Cross-entropy of targets given prompts; one term, "lm", and the metric "nll".

    Batch: tokens, targets, target_weights, prefix, segment_ids, positions [B, T], and the number of the task [B].
    """

    model: Transformer
    coefs: Mapping[str, Any] = option({"lm": 1.0}, "weight of the term 'lm'")
    mask: str = option("causal", "causal | prefix (the tokens of a prompt see each other)")
    loss_on: str = option("target", "target | all (the prompt is predicted too)")
    max_new: int = option(64, "tokens generated per example, at most, when the task is scored")
    label_smoothing: float = option(0.0, "probability given to all tokens alike")
    loss_chunk: int = option(0, "tokens whose logits are held at a time; 0 holds all")

    def __post_init__(self) -> None:
        choose("objective.mask", self.mask, MASKS)
        choose("objective.loss_on", self.loss_on, ("target", "all"))
        if self.mask == "prefix" and self.loss_on == "all":
            raise UserError("objective.loss_on is 'all', but under mask='prefix' the prompt's tokens see each other.")
        for name, ok, allowed in (
            ("max_new", self.max_new >= 1, "at least 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("loss_chunk", self.loss_chunk >= 0, "0 or more tokens"),
        ):
            if not ok:
                raise UserError(f"objective.{name} is {getattr(self, name)!r}; it must be {allowed}.")

    @classmethod
    def rows(cls, options: Mapping[str, Any], host: Host) -> PromptRows:
        own = cls(model=None, **check_options(cls, options))  # for the defaults
        return PromptRows(host.special("eot"), host.context_length, own.loss_on, own.max_new, own.mask == "prefix")

    def init(self, key: Array, batch: Batch) -> Params:
        return {"model": self.model.init(key, batch["tokens"])["params"]}

    def batch_spec(self, batch_size: int, context_length: int) -> Any:
        shape = (batch_size, context_length)
        kinds = {name: jnp.int32 for name in ("tokens", "targets", "segment_ids", "positions")}
        kinds |= {"target_weights": jnp.float32, "prefix": jnp.bool_}
        return {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}

    def prepare(self, batch: Batch, keys: Array, step: Array) -> Batch:
        return {**batch, "weights": {"lm": batch["target_weights"]}}

    def loss(self, params: Params, batch: Batch, keys: Array, train: bool) -> tuple[dict, dict]:
        prefix = batch["prefix"] if self.mask == "prefix" else None
        loss_BxT, nll_BxT = token_losses(
            self.model,
            params["model"],
            batch["tokens"],
            batch["targets"],
            mask=Mask(self.mask, segments_BxT=batch["segment_ids"], prefix_BxT=prefix),
            positions_BxT=batch["positions"],
            keys_B=keys if train else None,
            label_smoothing=self.label_smoothing,
            chunk=self.loss_chunk,
        )
        weights = batch["weights"]["lm"]
        return {"lm": jnp.sum(weights * loss_BxT)}, {"nll": (jnp.sum(weights * nll_BxT), jnp.sum(weights))}
