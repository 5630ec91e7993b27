"""Replaced-token detection (ELECTRA, Clark et al. 2020): tell a generator's tokens from the text's own.

A small generator is a masked language model (gpt_jax/objectives/masked_lm.py). Its samples, argmax(logits / temperature
+ Gumbel noise), take the places of the selected tokens, and the discriminator says of every token whether it is another
than the text's. The loss is 1 * MLM + 50 * binary cross-entropy over all tokens but padding. A sample is a number:
nothing of the second term reaches the generator, except through the table of embeddings that both may share.

Roots: "model" is the discriminator, a Transformer like any other to fine-tune from (`init.from`); "generator"; and
"rtd", the head. With share="embeddings" the token (and position) embeddings are the discriminator's, and the generator
projects them to its width and back (`model.embedding_size`).

Where the discriminator knows nothing, its least loss is the entropy of the part of tokens that are replaced
(the metric fake_rate).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from gpt_jax.errors import UserError, choose
from gpt_jax.losses import binary_cross_entropy
from gpt_jax.model import ModelConfig, Transformer
from gpt_jax.model.random import fold_name
from gpt_jax.objectives import masking
from gpt_jax.objectives.base import Batch, Objective, Params, Setting, check_model_options, check_options, text_spec
from gpt_jax.objectives.heads import init_token_score, token_score
from gpt_jax.objectives.masked_lm import MaskedLM, with_edit_schedule
from gpt_jax.options import option

SHARED = ("embedding", "position_embedding")


@dataclasses.dataclass(frozen=True)
class ReplacedToken(Objective):
    """A generator's cross-entropy, "mlm", and its discriminator's, "rtd"; "edit" as in MaskedLM, if `coefs` has it.

    Metrics: the generator's "accuracy" and "mlm_nll" (see MaskedLM); "fake_rate", the part of all tokens that differ
    from the text's; the discriminator's "rtd_accuracy", "rtd_precision" and "rtd_recall" of them at probability 1/2.

    Batch: as MaskedLM. Attributes: model is the discriminator's; mask_token, specials as in MaskedLM.
    """

    generates: ClassVar[bool] = False

    model: Transformer
    mask_token: int
    specials: tuple[int, ...] = ()
    coefs: Mapping[str, Any] = option({"mlm": 1.0, "rtd": 50.0}, "weight of each term: mlm, rtd, edit")
    fraction: float = option(0.25, "width of the generator as a part of the discriminator's")
    generator: Mapping[str, Any] = option({}, "what else is different in the generator, e.g. {'num_layers': 2}")
    share: str = option("embeddings", "embeddings | none: what the generator has in common with the discriminator")
    temperature: float = option(1.0, "of the generator's samples")
    rate: float = option(0.15, "part of a row's tokens that is selected")
    select: str = option("replacement", " | ".join(masking.SELECTIONS))
    max_predictions: int = option(0, "most tokens selected in a row; 0 is no bound")
    shares: tuple[float, ...] = option((0.85, 0.0, 0.15), "parts replaced by [MASK], by a random token, kept")
    edit_gamma: float = option(0.1, "softness of the edit distance")
    edit_after: float = option(0.1, "from a config: part of the run before the term 'edit' begins")

    def __post_init__(self) -> None:
        choose("objective.share", self.share, ("embeddings", "none"))
        if not self.temperature > 0:
            raise UserError(f"objective.temperature is {self.temperature!r}; it must be above 0.")
        own, other = self.masked_lm.model.config, self.model.config  # made here, so that its options are checked
        if self.share == "embeddings":
            for name in ("vocab_size", "vocab_multiple", "embed_size", "positions", "max_positions"):
                if getattr(own, name) != getattr(other, name):
                    raise UserError(
                        f"the generator's {name} is {getattr(own, name)!r} and the discriminator's "
                        f"{getattr(other, name)!r}; with objective.share='embeddings' they must be equal."
                    )

    @classmethod
    def build(cls, options: Mapping[str, Any], setting: Setting) -> ReplacedToken:
        ids = dict(mask_token=setting.special("mask"), specials=tuple(setting.specials.values()))
        return with_edit_schedule(
            cls(model=Transformer(setting.model), **ids, **check_options(cls, options)), setting.steps
        )

    @classmethod
    def parts_of_steps(cls, options: Mapping[str, Any]) -> Sequence[str]:
        return ("edit_after",) if options.get("coefs.edit") and options.get("edit_after", cls.edit_after) else ()

    @property
    def masked_lm(self) -> MaskedLM:
        """The generator's objective."""
        return MaskedLM(
            Transformer(generator_config(self.model.config, self.fraction, self.share, self.generator)),
            mask_token=self.mask_token,
            specials=self.specials,
            coefs={term: coef for term, coef in self.coefs.items() if term != "rtd"},
            rate=self.rate,
            select=self.select,
            max_predictions=self.max_predictions,
            shares=self.shares,
            edit_gamma=self.edit_gamma,
        )

    def init(self, key: Array, batch: Batch) -> Params:
        """The same parameters of the discriminator as an objective with only that root would start from."""
        generator = self.masked_lm.init(fold_name(key, "generator"), batch)["model"]
        if self.share == "embeddings":
            generator = {name: leaf for name, leaf in generator.items() if name not in SHARED}
        head = init_token_score(fold_name(key, "rtd"), self.model.config)
        return {"model": self.model.init(key, batch["tokens"])["params"], "generator": generator, "rtd": head}

    def batch_spec(self, batch_size: int, context_length: int) -> Any:
        return text_spec(batch_size, context_length)

    def prepare(self, batch: Batch, keys: Array, step: Array) -> Batch:
        out = self.masked_lm.prepare(batch, keys, step)
        out["weights"] |= {"rtd": masking.real_tokens(batch).astype(jnp.float32)}
        return out

    def loss(self, params: Params, batch: Batch, keys: Array, train: bool) -> tuple[dict, dict]:
        logits_BxNxV, corrupted = self.replace(params, batch, keys, train)
        sums, metrics = self.masked_lm.measure(logits_BxNxV, batch)
        scores = self.detect(params, batch, corrupted, fold_name(keys, "discriminator") if train else None)
        fake, guess, weights = corrupted != batch["tokens"], scores > 0, batch["weights"]["rtd"]
        sums["rtd"] = jnp.sum(weights * binary_cross_entropy(scores, fake))
        total, caught = jnp.sum(weights), jnp.sum(weights * (guess & fake))
        metrics |= {
            "fake_rate": (jnp.sum(weights * fake), total),
            "rtd_accuracy": (jnp.sum(weights * (guess == fake)), total),
            "rtd_precision": (caught, jnp.sum(weights * guess)),
            "rtd_recall": (caught, jnp.sum(weights * fake)),
        }
        return sums, metrics

    def replace(self, params: Params, batch: Batch, keys: Array, train: bool = False) -> tuple[Array, Array]:
        """The generator's logits [B, N, V] at the slots of a prepared batch, and the text with its samples [B, T]."""
        own = params["generator"]
        if self.share == "embeddings":
            own = {**own, **{name: params["model"][name] for name in SHARED if name in params["model"]}}
        logits = self.masked_lm.token_logits({"model": own}, batch, fold_name(keys, "generator") if train else None)
        samples = gumbel_sample(fold_name(keys, "sample"), lax.stop_gradient(logits) / self.temperature)
        T = batch["tokens"].shape[1]
        places = jnp.where(batch["weights"]["mlm"] > 0, batch["slots"], T)  # T is nowhere
        put = jax.vmap(lambda row, place, new: row.at[place].set(new, mode="drop"))
        return logits, put(batch["tokens"], places, samples.astype(batch["tokens"].dtype))

    def detect(self, params: Params, batch: Batch, corrupted: Array, keys: Array | None = None) -> Array:
        """Scores [B, T], logits of a token being another than the text's; `keys` for dropout."""
        options = dict(mask=masking.bidirectional_mask(batch), positions=batch.get("positions"), keys=keys)
        hidden, _ = self.model.apply({"params": params["model"]}, corrupted, **options, method="encode")
        return token_score(params["rtd"], hidden)


def gumbel_sample(keys_B: Array, logits_BxNxV: Array) -> Array:
    """Draws from softmax(logits) as argmax(logits + Gumbel noise), [B, N]."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits_BxNxV.shape[1:], logits_BxNxV.dtype))(keys_B)
    return jnp.argmax(logits_BxNxV + noise, axis=-1)


def generator_config(
    config: ModelConfig, fraction: float, share: str = "embeddings", overrides: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The generator of a discriminator: the same depth, `fraction` of its width, heads and feed-forward layer.

    The number of heads is the largest up to `fraction` of the discriminator's that divides the width. Its output layer
    is the transposed embedding.

    Raises:
      UserError: a fraction outside (0, 1], or a key that a model does not have.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"objective.fraction is {fraction!r}; it must be in (0, 1].")
    overrides = check_model_options("objective.generator", overrides or {})
    width = max(2, 2 * round(config.d_model * fraction / 2))
    even = 2 if config.positions == "rope" else 1
    most = max(1, round(config.num_heads * fraction))
    smaller = dict(
        d_model=width,
        num_heads=max(h for h in range(1, most + 1) if width % (h * even) == 0),
        num_kv_heads=0,
        head_dim=0,
        head_dims=(),
        d_ff=max(1, round(config.d_ff * fraction)) if config.d_ff else 0,
        embedding_size=config.embed_size if share == "embeddings" else config.embedding_size,
        tie_embeddings=True,
    )
    return dataclasses.replace(config, **smaller | overrides)
