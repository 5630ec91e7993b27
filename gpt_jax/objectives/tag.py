"""Tagging of words (named entities, roles of identifiers) by a linear head on the model (Devlin et al. 2019, 5.3).

A row is EOT word word ..., each word but the first with a space before it, encoded by itself. The first sub-token of a
word carries its tag: loss, metrics and predictions are there only. The mask is bidirectional by default: under a
causal one a tag cannot see what stands on the right.

Several tasks share the rows and the head, as in classify.py.
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
from gpt_jax.errors import choose
from gpt_jax.losses import cross_entropy
from gpt_jax.model import Transformer
from gpt_jax.model.random import fold_name
from gpt_jax.objectives.base import Batch, Host, Objective, Params, Setting, check_options
from gpt_jax.objectives.classify import only_own_labels
from gpt_jax.objectives.heads import apply_linear, check_dropout, hidden_states, init_linear
from gpt_jax.options import option


@dataclasses.dataclass(frozen=True)
class TagRows:
    """A row per example (an ExampleRows): words that begin beyond it are cut off."""

    eot: int
    length: int
    kind: str = "tag"
    pack: bool = False
    generates: bool = False

    @property
    def arrays(self) -> Arrays:
        kinds = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), np.int32)
        return {name: ((self.length,), kind) for name, kind in (kinds | {"target_weights": np.float32}).items()}

    def encode(self, example: Any, task: TaskInfo, tokenizer: Any) -> list[Row]:
        ids, heads = [self.eot], []
        for number, word in enumerate(example.words):
            tokens = tokenizer.encode(f" {word}" if number else word).tolist() or [self.eot]  # it knows no such word
            spoken = [bool(tokenizer.token_bytes(token).strip(b" ")) for token in tokens]
            heads.append(len(ids) + (spoken.index(True) if True in spoken else 0))  # the space alone is not the word
            ids += tokens
        ids, heads = ids[: self.length], [at for at in heads if at < self.length]
        targets, weights = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.float32)
        targets[heads] = [task.first_label + task.labels.index(tag) for tag in example.tags[: len(heads)]]
        weights[heads] = 1.0
        return [
            {
                "tokens": np.array(ids, np.int32),
                "targets": targets,
                "target_weights": weights,
                "segment_ids": np.ones(len(ids), np.int32),
                "positions": np.arange(len(ids), dtype=np.int32),
            }
        ]

    def predictions(self, outputs: Mapping[str, np.ndarray], encoded: Any) -> list[tuple[str, ...]]:
        labels, first = encoded.info.labels, encoded.info.first_label
        missing = "O" if "O" in labels else labels[0]  # of words that were cut off
        out = []
        for example, piece, tags in zip(encoded.examples, encoded.pieces, outputs["tags"], strict=True):
            found = [labels[i - first] for i in tags[np.flatnonzero(piece["target_weights"])].tolist()]
            out.append((*found, *[missing] * (len(example.words) - len(found))))
        return out


@dataclasses.dataclass(frozen=True)
class Tag(Objective):
    """Cross-entropy of the tags: the term "tag"; metrics "accuracy" and "tag_nll", per word.

    Batch: tokens, targets (tags), target_weights (1 at the first sub-token of a word), segment_ids, positions [B, T];
    task [B].

    Attributes:
      tasks: of the run. mask: what the tokens see.
    """

    generates: ClassVar[bool] = False

    model: Transformer
    tasks: tuple[TaskInfo, ...] = ()
    coefs: Mapping[str, Any] = option({"tag": 1.0}, "weight of the term 'tag'")
    mask: str = option("bidirectional", "bidirectional | causal")
    head_dropout: float = option(0.0, "rate on what the head reads")

    def __post_init__(self) -> None:
        choose("objective.mask", self.mask, ("bidirectional", "causal"))
        check_dropout(self.head_dropout)

    @classmethod
    def rows(cls, options: Mapping[str, Any], host: Host) -> TagRows:
        return TagRows(host.special("eot"), host.context_length)

    @classmethod
    def build(cls, options: Mapping[str, Any], setting: Setting) -> Tag:
        return cls(model=Transformer(setting.model), tasks=setting.tasks, **check_options(cls, options))

    def init(self, key: Array, batch: Batch) -> Params:
        labels = sum(len(task.labels) for task in self.tasks)
        head = init_linear(fold_name(key, "tagger"), self.model.config, labels)
        return {"model": self.model.init(key, batch["tokens"])["params"], "tagger": head}

    def batch_spec(self, batch_size: int, context_length: int) -> Any:
        kinds = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32)
        kinds |= {"target_weights": jnp.float32}
        spec = {name: jax.ShapeDtypeStruct((batch_size, context_length), kind) for name, kind in kinds.items()}
        return spec | {"task": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

    def prepare(self, batch: Batch, keys: Array, step: Array) -> Batch:
        return {**batch, "weights": {"tag": batch["target_weights"]}}

    def loss(self, params: Params, batch: Batch, keys: Array, train: bool) -> tuple[dict, dict]:
        logits = self._logits(params, batch, keys if train else None)
        loss, nll = cross_entropy(logits, batch["targets"])
        weights, words = batch["weights"]["tag"], jnp.sum(batch["target_weights"])
        right = jnp.argmax(logits, axis=-1) == batch["targets"]
        metrics = {
            "accuracy": (jnp.sum(batch["target_weights"] * right), words),
            "tag_nll": (jnp.sum(batch["target_weights"] * nll), words),
        }
        return {"tag": jnp.sum(weights * loss)}, metrics

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        return {"tags": jnp.argmax(self._logits(params, batch, None), axis=-1)}

    def _logits(self, params: Params, batch: Batch, keys: Array | None) -> Array:
        """Logits of every tag at every token, those of other tasks hidden. [B, T, tags] float32."""
        hidden = hidden_states(self.model, params["model"], batch, self.mask, keys)
        logits = apply_linear(params["tagger"], hidden, self.head_dropout, keys)
        return only_own_labels(logits, batch["task"], self.tasks)
