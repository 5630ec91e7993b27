"""Classification of a text or a pair of texts by a linear head on the model (Radford et al. 2018, section 3.2).

A row is EOT text [sep text] cls. Under the causal mask the token `cls` alone has seen all of it: the head reads there
('last'); 'mean' reads the average over the row, which suits the bidirectional mask. The loss of the text itself, "lm",
may be added with a coefficient (GPT-1's auxiliary term: 0.5).

Several tasks share the rows and the head: it has an output per label of each, and a row's probabilities are over the
labels of its own task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.data.formats import Arrays, Row, TaskInfo
from gpt_jax.errors import UserError, choose
from gpt_jax.losses import cross_entropy
from gpt_jax.model import Transformer
from gpt_jax.model.random import fold_name
from gpt_jax.objectives.base import Batch, Host, Objective, Params, Setting, check_options
from gpt_jax.objectives.heads import apply_linear, check_dropout, hidden_states, init_linear
from gpt_jax.options import option

POOLINGS = ("last", "mean")


@dataclasses.dataclass(frozen=True)
class ClassifyRows:
    """A row per example (an ExampleRows): too long a text loses its end, the first of a pair before the second."""

    eot: int
    sep: int
    cls: int
    length: int
    kind: str = "classify"
    pack: bool = False
    generates: bool = False

    @property
    def arrays(self) -> Arrays:
        tokens = {name: ((self.length,), np.int32) for name in ("tokens", "segment_ids", "positions")}
        return {**tokens, "label": ((), np.int32), "row_weights": ((), np.float32)}

    def encode(self, example: Any, task: TaskInfo, tokenizer: Any) -> list[Row]:
        first = tokenizer.encode(example.text).tolist()
        second = [self.sep, *tokenizer.encode(example.text_b).tolist()] if example.text_b else []
        second = second[: max(self.length - 2 - len(first), (self.length - 2) // 2)]
        ids = [self.eot, *first[: self.length - 2 - len(second)], *second, self.cls]
        return [
            {
                "tokens": np.array(ids, np.int32),
                "segment_ids": np.ones(len(ids), np.int32),
                "positions": np.arange(len(ids), dtype=np.int32),
                "label": np.int32(task.first_label + task.labels.index(example.label)),
                "row_weights": np.float32(1.0),
            }
        ]

    def predictions(self, outputs: Mapping[str, np.ndarray], encoded: Any) -> list[str]:
        labels = encoded.info.labels
        return [labels[i - encoded.info.first_label] for i in outputs["label"].tolist()]


@dataclasses.dataclass(frozen=True)
class Classify(Objective):
    """Cross-entropy of the label: the term "classify" (and "lm"); metrics "accuracy" and "classify_nll".

    Batch: tokens, segment_ids, positions [B, T]; label, row_weights, task [B].

    Attributes:
      tasks: of the run. mask: what the tokens see.
    """

    model: Transformer
    tasks: tuple[TaskInfo, ...] = ()
    coefs: Mapping[str, Any] = option({"classify": 1.0}, "weights of the terms 'classify' and 'lm' (GPT-1: 0.5)")
    pooling: str = option("last", "where the head reads: last (the token cls) | mean (of all tokens)")
    mask: str = option("causal", "causal | bidirectional")
    head_dropout: float = option(0.0, "rate on what the head reads")

    def __post_init__(self) -> None:
        choose("objective.pooling", self.pooling, POOLINGS)
        choose("objective.mask", self.mask, ("causal", "bidirectional"))
        check_dropout(self.head_dropout)
        for term in self.coefs:
            choose("a term of objective.coefs", term, ("classify", "lm"))
        if "lm" in self.coefs and self.mask != "causal":
            raise UserError("objective.coefs has 'lm', which needs mask='causal': else tokens see their targets.")

    @classmethod
    def rows(cls, options: Mapping[str, Any], host: Host) -> ClassifyRows:
        return ClassifyRows(host.special("eot"), host.special("sep"), host.special("cls"), host.context_length)

    @classmethod
    def build(cls, options: Mapping[str, Any], setting: Setting) -> Classify:
        return cls(model=Transformer(setting.model), tasks=setting.tasks, **check_options(cls, options))

    @property
    def generates(self) -> bool:
        return bool(self.coefs.get("lm"))

    @property
    def num_labels(self) -> int:
        return sum(len(task.labels) for task in self.tasks)

    def init(self, key: Array, batch: Batch) -> Params:
        head = init_linear(fold_name(key, "classifier"), self.model.config, self.num_labels)
        return {"model": self.model.init(key, batch["tokens"])["params"], "classifier": head}

    def batch_spec(self, batch_size: int, context_length: int) -> Any:
        tokens = jax.ShapeDtypeStruct((batch_size, context_length), jnp.int32)
        rows = {"label": jnp.int32, "task": jnp.int32, "row_weights": jnp.float32}
        return {name: tokens for name in ("tokens", "segment_ids", "positions")} | {
            name: jax.ShapeDtypeStruct((batch_size,), kind) for name, kind in rows.items()
        }

    def prepare(self, batch: Batch, keys: Array, step: Array) -> Batch:
        weights = {"classify": batch["row_weights"]}
        if "lm" in self.coefs:
            following = batch["segment_ids"][:, 1:] > 0
            weights["lm"] = jnp.pad(following, ((0, 0), (0, 1))) * batch["row_weights"][:, None]
        return {**batch, "weights": weights}

    def loss(self, params: Params, batch: Batch, keys: Array, train: bool) -> tuple[dict, dict]:
        hidden = self._encode(params, batch, keys if train else None)
        logits = self._logits(params, batch, hidden, keys if train else None)
        loss, nll = cross_entropy(logits, batch["label"])
        weights = batch["weights"]
        right = jnp.argmax(logits, axis=-1) == batch["label"]
        sums = {"classify": jnp.sum(weights["classify"] * loss)}
        rows = jnp.sum(batch["row_weights"])
        metrics = {
            "accuracy": (jnp.sum(batch["row_weights"] * right), rows),
            "classify_nll": (jnp.sum(batch["row_weights"] * nll), rows),
        }
        if "lm" in self.coefs:
            logits = self.model.apply({"params": params["model"]}, hidden, method="unembed")
            lm, _ = cross_entropy(
                logits, jnp.roll(batch["tokens"], -1, axis=1), vocab_size=self.model.config.vocab_size
            )
            sums["lm"] = jnp.sum(weights["lm"] * lm)
        return sums, metrics

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        logits = self._logits(params, batch, self._encode(params, batch, None), None)
        return {"label": jnp.argmax(logits, axis=-1), "log_probs": jax.nn.log_softmax(logits)}

    def _encode(self, params: Params, batch: Batch, keys: Array | None) -> Array:
        return hidden_states(self.model, params["model"], batch, self.mask, keys)

    def _logits(self, params: Params, batch: Batch, hidden_BxTxD: Array, keys: Array | None) -> Array:
        """Logits of every label, those of other tasks hidden. [B, labels] float32."""
        used = batch["segment_ids"] > 0
        if self.pooling == "mean":
            share = used / jnp.maximum(jnp.sum(used, axis=1, keepdims=True), 1)
            pooled = jnp.einsum("btd,bt->bd", hidden_BxTxD, share.astype(hidden_BxTxD.dtype))
        else:
            last = jnp.maximum(jnp.sum(used, axis=1) - 1, 0)
            pooled = jnp.take_along_axis(hidden_BxTxD, last[:, None, None], axis=1)[:, 0]
        logits = apply_linear(params["classifier"], pooled, self.head_dropout, keys)
        return only_own_labels(logits, batch["task"], self.tasks)


def only_own_labels(logits: Array, task_B: Array, tasks: tuple[TaskInfo, ...]) -> Array:
    """Hides the logits [B, ..., labels] of labels that are not of the row's own task."""
    if len(tasks) < 2:
        return logits
    owner = jnp.asarray(np.repeat(np.arange(len(tasks)), [len(task.labels) for task in tasks]))
    own = owner == task_B[:, None]
    return jnp.where(own.reshape(own.shape[0], *(1,) * (logits.ndim - 2), own.shape[1]), logits, -1e30)
