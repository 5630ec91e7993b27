"""A model to look into: its forward pass with taps, compiled once for each thing that is asked of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.model import Mask, Transformer
from gpt_jax.model.lora import merge_lora
from gpt_jax.model.taps import Taps


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and its parameters, LoRA merged in.

    Attributes:
      causal: False where it was trained to see both sides: then tokens are its input, not what it predicts next.
    """

    model: Transformer
    params: Any
    causal: bool = True

    @property
    def config(self) -> Any:
        return self.model.config

    def __call__(self, tokens_BxT: Any, taps: Taps | None = None) -> Any:
        """The Output of tokens [B, T]."""
        return _forward(self.model, self.params, jnp.asarray(tokens_BxT), taps, self.causal)

    def lens(self, residual: Array) -> Array:
        """Logits that residual streams [..., D] give by the final norm and the output layer."""
        return _lens(self.model, self.params, residual)


def subject_of(model: Transformer, params: Any, causal: bool = True) -> Subject:
    """Makes a Subject of a model's own parameters."""
    params, config = merge_lora(params, model.config)
    return Subject(Transformer(config), params, causal)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _forward(model: Transformer, params: Any, tokens: Array, taps: Taps | None, causal: bool) -> Any:
    mask = Mask() if causal else Mask("bidirectional", segments_BxT=jnp.ones(tokens.shape, jnp.int32))
    return model.apply({"params": params}, tokens, mask=mask, taps=taps)


@functools.partial(jax.jit, static_argnums=0)
def _lens(model: Transformer, params: Any, residual: Array) -> Array:
    return model.apply({"params": params}, residual, method="lens")


def token_losses(logits_BxTxV: Array, tokens_BxT: Array) -> Array:
    """-log p of each token but the first under the logits of the one before, nats, [B, T - 1]."""
    logp = jax.nn.log_softmax(logits_BxTxV[:, :-1].astype(jnp.float32))
    return -jnp.take_along_axis(logp, jnp.asarray(tokens_BxT)[:, 1:, None], axis=-1)[..., 0]


def logit_lens(subject: Subject, tokens_T: Any, top: int = 5) -> dict[str, np.ndarray]:
    """What every layer would predict (nostalgebraist 2020): LN_f(h_l) W_E^T; l = L is the model's own answer.

    Args:
      tokens_T: one text. top: how many tokens to return.

    Returns:
      ids, probabilities [L + 1, T, top]; target_probabilities [L + 1, T - 1] of the token that comes next; entropies
      [L + 1, T], nats.
    """
    tokens = np.asarray(tokens_T)[None]
    found = subject(tokens, Taps(collect=("residual",))).intermediates
    stream = jnp.concatenate([found["residual"][:, 0], found["residual_out"]])  # [L + 1, T, D]
    logp = jax.nn.log_softmax(subject.lens(stream).astype(jnp.float32))
    values, ids = jax.lax.top_k(logp, min(top, logp.shape[-1]))
    target = jnp.take_along_axis(logp[:, :-1], jnp.asarray(tokens[:, 1:])[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    out = dict(ids=ids, probabilities=jnp.exp(values), target_probabilities=jnp.exp(target), entropies=entropy)
    return {name: np.asarray(value) for name, value in out.items()}


def attention_maps(subject: Subject, tokens_T: Any) -> np.ndarray:
    """Attention weights [L, H, T, T] of one text; rows sum to 1 (before talking heads mix them)."""
    found = subject(np.asarray(tokens_T)[None], Taps(collect=("attention",))).intermediates
    return np.asarray(found["attention"][:, 0])


def attribute_logit(subject: Subject, tokens_T: Any, position: int, token: int) -> dict[str, Any]:
    """Direct logit attribution: what each part of the residual stream adds to a logit.

    The final norm is applied with the scale that it has on the whole stream, so the parts sum to the logit (before a
    soft-cap, which is left out).

    Args:
      tokens_T: a text. position: whose logits. token: which of them.

    Returns:
      {"logit", "embedding", "heads" [L][H], "attention_bias" [L], "mlp" [L], "rest"}: rest is the final norm's bias
      and that of the output layer.
    """
    config = dataclasses.replace(subject.config, logit_softcap=0.0)
    plain = Subject(Transformer(config), subject.params, subject.causal)
    kinds = ("residual", "heads", "attention_out", "mlp_out")
    output = plain(np.asarray(tokens_T)[None], Taps(collect=kinds))
    parts = jax.tree.map(lambda leaf: leaf[..., 0, position, :] if leaf.ndim == 4 else leaf, output.intermediates)
    heads_LxHxK = output.intermediates["heads"][:, 0, position]
    stream = output.intermediates["residual_out"][0, position].astype(jnp.float32)

    def logit(x: Array) -> Array:  # of what the final norm has scaled
        return plain.model.apply({"params": plain.params}, x, method="unembed")[..., token]

    hidden = output.hidden[0, position]
    slope = jax.grad(lambda x: logit(x).astype(jnp.float32))(hidden).astype(jnp.float32)
    norm = plain.params["final_norm"]
    mean = jnp.mean(stream) if config.norm == "layernorm" else 0.0
    scale = norm["scale"] * jax.lax.rsqrt(jnp.mean((stream - mean) ** 2) + config.norm_eps)

    def part(x: Array) -> Array:  # [..., D] -> [...]
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, -1, keepdims=True) if config.norm == "layernorm" else x
        return (centred * scale) @ slope

    written = jnp.stack(
        [_head_writes(plain.params, config, layer, heads_LxHxK[layer]) for layer in range(config.num_layers)]
    )
    attention = parts["attention_out"]
    total = logit(hidden)
    embedding, heads, mlp = part(parts["residual"][0]), part(written), part(parts["mlp_out"])
    bias = part(attention.astype(jnp.float32) - written.sum(1))
    rest = total - (embedding + heads.sum() + bias.sum() + mlp.sum())
    return {
        "logit": float(total),
        "embedding": float(embedding),
        "heads": np.asarray(heads).tolist(),
        "attention_bias": np.asarray(bias).tolist(),
        "mlp": np.asarray(mlp).tolist(),
        "rest": float(rest),
    }


def _head_writes(params: Any, config: Any, layer: int, heads_HxK: Array) -> Array:
    """What each head of a layer writes to the residual stream, [H, D]."""
    repetition, i = divmod(layer, len(config.pattern))
    kernel = params["layers"][f"block_{i}"]["attention"]["out"]["kernel"][repetition]
    if config.head_dims:
        ends = np.cumsum(config.head_dims)
        return jnp.stack(
            [
                heads_HxK[h, :size] @ kernel[end - size : end]
                for h, (size, end) in enumerate(zip(config.head_dims, ends, strict=True))
            ]
        )
    return jnp.einsum("hk,hkd->hd", heads_HxK, kernel.reshape(*heads_HxK.shape, -1))
