"""Causal language modelling: predict the next token; optionally reweighted by perplexity.

Reweighting ("diversity by perplexity"): sample i, a document segment or else a packed row, has n_i tokens of mean
negative log-likelihood l_i. Its weight is

    w_i = clip(r_i, low, high),   r_i = e^{s_i} sum(n) / sum_j n_j e^{s_j}   over the global batch, without gradient,

and the loss is sum_i w_i sum_{t in i} loss_t / sum_i w_i n_i. The score s_i by `reweight`:

    perplexity  alpha l_i: w_i ~ perplexity_i^alpha. Unclipped its gradient is that of the tilted risk
                (1/alpha) log mean e^{alpha l} (Li et al. 2021). alpha < 0 turns away from noise.
    literal     z-score(perplexity_i) / tau: the softmax of perplexities, for ablations: it goes to one-hot.
    focal       per token, (1 - p_t)^gamma instead of r (Lin et al. 2017, weights without gradient).
    excess      alpha (l_i - l_i under the frozen root "reference"): guards against noise (Mindermann et al. 2022).

`band` keeps only samples whose reference l_i lies between two quantiles (for generated text).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gpt_jax.errors import UserError, choose
from gpt_jax.model import Mask, Transformer
from gpt_jax.objectives.base import Batch, Objective, Params, Setting, check_options, text_spec
from gpt_jax.objectives.text import token_losses
from gpt_jax.options import option

REWEIGHTINGS = ("none", "perplexity", "literal", "focal", "excess")


@dataclasses.dataclass(frozen=True)
class CausalLM(Objective):
    """Next-token cross-entropy; one term, "lm", and the metric "nll".

    Batch: tokens, targets, target_weights [B, T]; with documents kept apart also segment_ids and positions [B, T].
    """

    model: Transformer
    coefs: Mapping[str, Any] = option({"lm": 1.0}, "weight of the term 'lm'")
    label_smoothing: float = option(0.0, "probability given to all tokens alike")
    z_loss: float = option(0.0, "coefficient of logsumexp^2")
    loss_chunk: int = option(0, "tokens whose logits are held at a time; 0 holds all (faster where they fit)")
    reweight: str = option("none", " | ".join(REWEIGHTINGS))
    alpha: float = option(0.5, "exponent of perplexity (perplexity, excess)")
    alpha_warmup_steps: int = option(0, "alpha grows linearly over so many steps; from a config, 0 is 10% of the run")
    clip: tuple[float, ...] = option((0.5, 2.0), "bounds of a sample's weight; () is unbounded")
    tau: float = option(1.0, "temperature of literal")
    gamma: float = option(1.0, "exponent of focal")
    band: tuple[float, ...] = option((), "quantiles of reference nll between which samples are kept; () keeps all")

    def __post_init__(self) -> None:
        choose("objective.reweight", self.reweight, REWEIGHTINGS)
        for name, ok, allowed in (
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("loss_chunk", self.loss_chunk >= 0, "0 or more tokens"),
            ("alpha_warmup_steps", self.alpha_warmup_steps >= 0, "0 or more steps"),
            ("tau", self.tau > 0, "above 0"),
            ("gamma", self.gamma >= 0, "0 or more"),
            (
                "clip",
                self.clip == () or (len(self.clip) == 2 and 0 <= self.clip[0] <= self.clip[1]),
                "(low, high) or ()",
            ),
            (
                "band",
                self.band == () or (len(self.band) == 2 and 0 <= self.band[0] < self.band[1] <= 1),
                "two rising quantiles in [0, 1], or ()",
            ),
        ):
            if not ok:
                raise UserError(f"objective.{name} is {getattr(self, name)!r}; it must be {allowed}.")

    @classmethod
    def build(cls, options: Mapping[str, Any], setting: Setting) -> CausalLM:
        objective = cls(model=Transformer(setting.model), **check_options(cls, options))
        if objective.alpha_warmup_steps == 0:
            objective = dataclasses.replace(objective, alpha_warmup_steps=setting.steps // 10)
        return objective

    @classmethod
    def parts_of_steps(cls, options: Mapping[str, Any]) -> Sequence[str]:
        relative = options.get("reweight") in ("perplexity", "excess") and not options.get("alpha_warmup_steps")
        return ("alpha_warmup_steps",) if relative else ()

    @property
    def uses_reference(self) -> bool:
        return self.reweight == "excess" or bool(self.band)

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("reference/.*",) if self.uses_reference else ()

    def init(self, key: Array, batch: Batch) -> Params:
        roots = {"model": self.model.init(key, batch["tokens"])["params"]}
        if self.uses_reference:
            roots["reference"] = self.model.init(key, batch["tokens"])["params"]
        return roots

    def batch_spec(self, batch_size: int, context_length: int) -> Any:
        return text_spec(batch_size, context_length)

    def prepare(self, batch: Batch, keys: Array, step: Array) -> Batch:
        return {**batch, "weights": {"lm": batch["target_weights"]}}

    def loss(self, params: Params, batch: Batch, keys: Array, train: bool) -> tuple[dict, dict]:
        loss_BxT, nll_BxT = self._token_losses(params["model"], batch, keys if train else None)
        mask = batch["target_weights"]
        metrics = {"nll": (jnp.sum(mask * nll_BxT), jnp.sum(mask))}
        return {"lm": jnp.sum(batch["weights"]["lm"] * loss_BxT)}, metrics

    def _token_losses(self, params: Params, batch: Batch, keys: Array | None) -> tuple[Array, Array]:
        """Returns (loss, nll), each [B, T]."""
        return token_losses(
            self.model,
            params,
            batch["tokens"],
            batch["targets"],
            mask=Mask("causal", segments_BxT=batch.get("segment_ids")),
            positions_BxT=batch.get("positions"),
            keys_B=keys,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
            chunk=self.loss_chunk,
        )

    @property
    def needs_scores(self) -> bool:
        return self.reweight != "none" or bool(self.band)

    def score(self, params: Params, batch: Batch, keys: Array) -> dict[str, Array]:
        scores = {"nll": self._token_losses(params["model"], batch, None)[1]}
        if self.uses_reference:
            scores["reference_nll"] = self._token_losses(params["reference"], batch, None)[1]
        return scores

    def weigh(self, batch: Batch, scores: dict[str, Array], step: Array) -> Batch:
        mask = batch["target_weights"]
        weights = mask * sample_weights(self, mask, batch.get("segment_ids"), scores, step)
        return {**batch, "weights": {"lm": jax.lax.stop_gradient(weights)}}


def sample_weights(
    objective: CausalLM, mask_BxT: Array, segment_ids: Array | None, scores: dict[str, Array], step: Array
) -> Array:
    """Returns each token's weight [B, T]: that of its sample, or its own (focal). Formulas: the module's docstring."""
    nll = scores["nll"]
    if objective.reweight == "focal":
        token = (1.0 - jnp.exp(-nll)) ** objective.gamma
        weights = token
    else:
        weights = jnp.ones_like(nll)
    sample = _sample_index(mask_BxT, segment_ids)
    n = _per_sample(mask_BxT, sample)
    mean = _per_sample(mask_BxT * nll, sample) / jnp.maximum(n, 1.0)
    warm = jnp.minimum(1.0, (step + 1) / objective.alpha_warmup_steps) if objective.alpha_warmup_steps else 1.0
    reference = None
    if "reference_nll" in scores:
        reference = _per_sample(mask_BxT * scores["reference_nll"], sample) / jnp.maximum(n, 1.0)
    if objective.reweight in ("perplexity", "literal", "excess"):
        if objective.reweight == "perplexity":
            score = objective.alpha * warm * mean
        elif objective.reweight == "excess":
            score = objective.alpha * warm * (mean - reference)
        else:
            perplexity = jnp.exp(mean)
            present = n > 0
            count = jnp.maximum(jnp.sum(present), 1)
            centre = jnp.sum(jnp.where(present, perplexity, 0.0)) / count
            spread = jnp.sqrt(jnp.sum(jnp.where(present, (perplexity - centre) ** 2, 0.0)) / count)
            score = (perplexity - centre) / jnp.maximum(spread, 1e-6) / objective.tau
        score = jnp.where(n > 0, score, -jnp.inf)
        score = jnp.exp(score - jnp.max(score))
        ratio = score * jnp.sum(n) / jnp.maximum(jnp.sum(n * score), 1e-30)
        if objective.clip:
            ratio = jnp.clip(ratio, *objective.clip)
        weights = weights * ratio[sample]
    if objective.band:
        low, high = jnp.nanquantile(jnp.where(n > 0, reference, jnp.nan), jnp.asarray(objective.band))
        weights = weights * ((reference >= low) & (reference <= high))[sample]
    return weights


def _sample_index(mask_BxT: Array, segment_ids: Array | None) -> Array:
    """Numbers the samples of a batch: a number per (row, segment), or per row. [B, T]."""
    B, T = mask_BxT.shape
    row = jnp.arange(B)[:, None]
    if segment_ids is None:
        return jnp.broadcast_to(row, (B, T))
    return row * (T + 1) + segment_ids


def _per_sample(values_BxT: Array, sample_BxT: Array) -> Array:
    """Sums values by sample: [number of samples there can be]."""
    B, T = values_BxT.shape
    return jax.ops.segment_sum(values_BxT.reshape(-1), sample_BxT.reshape(-1), num_segments=B * (T + 1))
