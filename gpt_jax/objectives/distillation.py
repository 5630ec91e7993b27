"""Distillation (Hinton et al. 2015): a student learns the next-token distribution of a frozen teacher.

With student q, teacher p, both softened by the temperature s, and the tokens of the batch, weighted w_t:

    lm       sum_t w_t CE(x_{t+1}, q_t)                                       the ordinary loss, at temperature 1
    distill  sum_t w_t s^2 KL(p_t^{1/s} || q_t^{1/s})                         s^2 keeps its gradient's size

The teacher is another run with the same tokenizer, of any shape: `objective.teacher` says what is different from the
student's model, and `init.from` brings its weights under their new name:

    gpt-jax train --config=distillation --workdir=runs/student --config.init.from=runs/teacher \\
      --config.init.model=False "--config.init.rename=(('^model/', 'teacher/'),)"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from gpt_jax.errors import UserError
from gpt_jax.losses import cross_entropy
from gpt_jax.model import Mask, Transformer
from gpt_jax.model.random import fold_name
from gpt_jax.objectives.base import Batch, Objective, Params, Setting, check_model_options, check_options, text_spec
from gpt_jax.options import option

TERMS = ("lm", "distill")


@dataclasses.dataclass(frozen=True)
class Distillation(Objective):
    """Two terms, "lm" and "distill"; metrics "nll" (of the text), "kl" (at temperature 1, nats) and "agreement".

    "agreement" is how often the likeliest token of student and teacher is the same one. Batch: as CausalLM's.
    """

    model: Transformer
    coefs: Mapping[str, Any] = option({"lm": 0.5, "distill": 0.5}, "weight of each term")
    teacher: Mapping[str, Any] = option({}, "what is different in the teacher's model, e.g. {'num_layers': 12}")
    temperature: float = option(2.0, "of both distributions in the term 'distill'")

    frozen = ("teacher/.*",)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"objective.temperature is {self.temperature!r}; it must be above 0.")
        if self.teacher_model.config.vocab_size != self.model.config.vocab_size:
            raise UserError(
                f"the teacher's vocab_size is {self.teacher_model.config.vocab_size} and the student's "
                f"{self.model.config.vocab_size}; they must be equal: both have the same tokenizer."
            )

    @classmethod
    def build(cls, options: Mapping[str, Any], setting: Setting) -> Distillation:
        return cls(model=Transformer(setting.model), **check_options(cls, options))

    @property
    def teacher_model(self) -> Transformer:
        own = check_model_options("objective.teacher", self.teacher)
        return Transformer(dataclasses.replace(self.model.config, **own))

    def init(self, key: Array, batch: Batch) -> Params:
        teacher = self.teacher_model.init(fold_name(key, "teacher"), batch["tokens"])["params"]
        return {"model": self.model.init(key, batch["tokens"])["params"], "teacher": teacher}

    def batch_spec(self, batch_size: int, context_length: int) -> Any:
        return text_spec(batch_size, context_length)

    def prepare(self, batch: Batch, keys: Array, step: Array) -> Batch:
        return {**batch, "weights": {term: batch["target_weights"] for term in TERMS if term in self.coefs}}

    def loss(self, params: Params, batch: Batch, keys: Array, train: bool) -> tuple[dict, dict]:
        student_BxTxV = _logits(self.model, params["model"], batch, keys if train else None)
        teacher_BxTxV = lax.stop_gradient(_logits(self.teacher_model, params["teacher"], batch, None))
        loss_BxT, nll_BxT = cross_entropy(student_BxTxV, batch["targets"], vocab_size=self.model.config.vocab_size)
        mask, s = batch["target_weights"], self.temperature
        terms = {"lm": loss_BxT, "distill": s * s * divergence(teacher_BxTxV / s, student_BxTxV / s)}
        same = jnp.argmax(student_BxTxV, -1) == jnp.argmax(teacher_BxTxV, -1)
        measured = {"nll": nll_BxT, "kl": divergence(teacher_BxTxV, student_BxTxV), "agreement": same}
        sums = {term: jnp.sum(batch["weights"][term] * terms[term]) for term in TERMS if term in self.coefs}
        return sums, {name: (jnp.sum(mask * value), jnp.sum(mask)) for name, value in measured.items()}


def divergence(teacher: Array, student: Array) -> Array:
    """KL(softmax(teacher) || softmax(student)) of logits over the last axis, nats."""
    p, q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def _logits(model: Transformer, params: Any, batch: Batch, keys: Array | None) -> Array:
    mask = Mask("causal", segments_BxT=batch.get("segment_ids"))
    out = model.apply({"params": params}, batch["tokens"], mask=mask, positions=batch.get("positions"), keys=keys)
    return out.logits.astype(jnp.float32)
