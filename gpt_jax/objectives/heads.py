"""Heads on a model's hidden states, and those states: parameters with logical axes, applied in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from gpt_jax.errors import UserError
from gpt_jax.model import Mask, ModelConfig, Transformer
from gpt_jax.model.random import dropout, fold_name


def init_linear(key: Array, config: ModelConfig, outputs: int, bias: bool = True) -> dict[str, Any]:
    """Returns {"kernel": [D, outputs], "bias": [outputs]}, boxed with their logical axes; the bias starts at 0.

    A softmax over places, not over outputs, needs no bias: it does not see what is added to all of them.
    """
    kernel = config.init_std * jax.random.normal(key, (config.d_model, outputs), jnp.dtype(config.param_dtype))
    params = {"kernel": nn.LogicallyPartitioned(kernel, ("embed", None))}
    if bias:
        params["bias"] = nn.LogicallyPartitioned(jnp.zeros(outputs, config.param_dtype), (None,))
    return params


def apply_linear(params: Any, x: Array, rate: float = 0.0, keys_B: Array | None = None) -> Array:
    """x [B, ..., D] -> [B, ..., outputs] float32, with dropout of x under a key per row."""
    if keys_B is not None:
        x = dropout(x, rate, fold_name(keys_B, "head"))
    y = x.astype(jnp.float32) @ params["kernel"].astype(jnp.float32)
    return y + params["bias"].astype(jnp.float32) if "bias" in params else y


def check_dropout(rate: float) -> None:
    """Raises UserError for a rate of dropout before a head that leaves nothing, or is none."""
    if not 0 <= rate < 1:
        raise UserError(f"objective.head_dropout is {rate!r}; it must be in [0, 1).")


def init_token_score(key: Array, config: ModelConfig) -> dict[str, Any]:
    """Parameters of `token_score`: a layer as wide as the model, and one output."""
    return {
        "dense": init_linear(fold_name(key, "dense"), config, config.d_model),
        "score": init_linear(fold_name(key, "score"), config, 1),
    }


def token_score(params: Any, hidden_BxTxD: Array) -> Array:
    """The logit of a yes per token, [B, T]: a layer with GELU and one output, as ELECTRA's discriminator."""
    return apply_linear(params["score"], jax.nn.gelu(apply_linear(params["dense"], hidden_BxTxD)))[..., 0]


def hidden_states(
    model: Transformer, params: Any, batch: Mapping[str, Array], mask: str, keys_B: Array | None = None
) -> Array:
    """Returns the last hidden states [B, T, D] of rows of examples.

    Args:
      params: of the model's own root. batch: tokens, segment_ids (0 is padding) and positions, [B, T] each.
      mask: kind of the Mask. keys_B: for dropout; None is deterministic.
    """
    return model.apply(
        {"params": params},
        batch["tokens"],
        mask=Mask(mask, segments_BxT=batch["segment_ids"]),
        positions=batch["positions"],
        keys=keys_B,
        method="encode",
    )[0]
