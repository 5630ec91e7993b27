"""Filters: a classifier's confidence, a band of a reference model's perplexity, a discriminator's replaced tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.augment.base import Synthetic
from gpt_jax.errors import UserError
from gpt_jax.generation import bucket
from gpt_jax.loading import Loaded
from gpt_jax.model import Mask, Transformer
from gpt_jax.objectives.base import Setting, build_objective, special_id
from gpt_jax.objectives.text import token_losses

_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Confidence:
    """Multiplies scores by a classifier's probability of the label; leaves out what is below `least`.

    Attributes:
      probabilities: texts -> [N, labels]. labels: in that order.
    """

    probabilities: Callable[[Sequence[str]], np.ndarray]
    labels: Sequence[str]
    least: float = 0.0
    name: str = "confidence"

    def keep(self, candidates: Sequence[Synthetic]) -> list[Synthetic]:
        if not candidates:
            return []
        table = self.probabilities([c.text for c in candidates])
        values = [float(row[self.labels.index(c.label)]) for c, row in zip(candidates, table, strict=True)]
        return [c._replace(score=c.score * v) for c, v in zip(candidates, values, strict=True) if v >= self.least]


@dataclasses.dataclass(frozen=True)
class Replaced:
    """Multiplies scores by 1 - the mean probability that a token of the text has been replaced.

    Attributes:
      replaced: texts -> [N]. most: leaves out what is above.
    """

    replaced: Callable[[Sequence[str]], np.ndarray]
    most: float = 1.0
    name: str = "rtd"

    def keep(self, candidates: Sequence[Synthetic]) -> list[Synthetic]:
        if not candidates:
            return []
        values = self.replaced([c.text for c in candidates]).tolist()
        pairs = zip(candidates, values, strict=True)
        return [c._replace(score=c.score * (1.0 - v)) for c, v in pairs if v <= self.most]


@dataclasses.dataclass(frozen=True)
class PerplexityBand:
    """Keeps candidates whose mean nll per token under a reference lies between two quantiles of the candidates'.

    Attributes:
      nll: texts -> [N], nats per token. low, high: quantiles.
    """

    nll: Callable[[Sequence[str]], np.ndarray]
    low: float = 0.05
    high: float = 0.9
    name: str = "band"

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise UserError(
                f"the band of perplexity is {self.low},{self.high}; two rising quantiles in [0, 1] are needed."
            )

    def keep(self, candidates: Sequence[Synthetic]) -> list[Synthetic]:
        if not candidates:
            return []
        values = self.nll([c.text for c in candidates])
        low, high = np.quantile(values, [self.low, self.high])
        return [c for c, v in zip(candidates, values.tolist(), strict=True) if low <= v <= high]


def reference_nll(run: Loaded, length: int = 0) -> Callable[[Sequence[str]], np.ndarray]:
    """Returns texts -> mean nll per token [N], nats, of EOT text EOT under a causal_lm; longer texts are cut."""
    if run.config.objective["name"] != "causal_lm":
        raise UserError(f"the reference is a run with the objective causal_lm, not {run.config.objective['name']!r}.")
    model, eot = Transformer(run.config.model), special_id(run.tokenizer.specials, "eot")
    length = length or run.config.context_length

    @jax.jit
    def losses(tokens: Any, segments: Any) -> Any:
        nll = token_losses(model, run.params, tokens[:, :-1], tokens[:, 1:], mask=Mask(segments_BxT=segments[:, :-1]))[
            1
        ]
        used = segments[:, 1:]
        return jnp.sum(nll * used, axis=1) / jnp.maximum(jnp.sum(used, axis=1), 1)

    return _over_texts(run.tokenizer, losses, lambda ids: [eot, *ids, eot], length + 1)


def replaced_rate(run: Loaded) -> Callable[[Sequence[str]], np.ndarray]:
    """Returns texts -> mean probability [N] that a token was replaced, by a run's discriminator (replaced_token)."""
    if run.config.objective["name"] != "replaced_token":
        raise UserError(
            f"the discriminator is a run with the objective replaced_token, not {run.config.objective['name']!r}."
        )
    setting = Setting(run.config.model, run.tokenizer.specials, run.config.steps)
    objective, eot = build_objective(run.config.objective, setting), special_id(run.tokenizer.specials, "eot")

    @jax.jit
    def rate(tokens: Any, segments: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        batch = {"segment_ids": segments, "positions": positions, "target_weights": segments.astype(jnp.float32)}
        scores = jax.nn.sigmoid(objective.detect(run.all_params, batch, tokens))
        used = (segments > 0) & (positions > 0)  # not the EOT, which never is
        return jnp.sum(scores * used, axis=1) / jnp.maximum(jnp.sum(used, axis=1), 1)

    return _over_texts(run.tokenizer, rate, lambda ids: [eot, *ids], run.config.context_length)


def _over_texts(
    tokenizer: Any, function: Callable[[Any, Any], Any], frame: Callable[[list[int]], list[int]], length: int
) -> Callable[[Sequence[str]], np.ndarray]:
    """Lifts (tokens [B, T], segments [B, T]) -> [B] to texts -> [N], in few shapes."""

    def run(texts: Sequence[str]) -> np.ndarray:
        out = []
        for start in range(0, len(texts), _ROWS):
            rows = [frame(tokenizer.encode(text).tolist())[:length] for text in texts[start : start + _ROWS]]
            shape = (bucket(len(rows)), min(length, bucket(max(map(len, rows)), least=16)))
            tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
            for i, ids in enumerate(rows):
                tokens[i, : len(ids)], segments[i, : len(ids)] = ids, 1
            out.append(np.asarray(function(tokens, segments), np.float32)[: len(rows)])
        return np.concatenate(out) if out else np.zeros(0, np.float32)

    return run
