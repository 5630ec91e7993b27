"""What objectives on tokens share: the losses of predicted tokens."""

from __future__ import annotations

from typing import Any

from jax import Array

from gpt_jax.losses import chunked_cross_entropy, cross_entropy
from gpt_jax.model import Mask, Transformer


def token_losses(
    model: Transformer,
    params: Any,
    tokens_BxT: Array,
    targets_BxT: Array,
    *,
    mask: Mask,
    positions_BxT: Array | None = None,
    keys_B: Array | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk: int = 0,
) -> tuple[Array, Array]:
    """Returns (loss, nll) of the targets, each [B, T], nats.

    Args:
      params: of the model's own root. mask: what a token may see. keys_B: for dropout; None is deterministic.
      z_loss, label_smoothing: see `cross_entropy`. chunk: tokens whose logits are held at a time; 0 holds all.
    """
    hidden_BxTxD, _ = model.apply(
        {"params": params}, tokens_BxT, mask=mask, positions=positions_BxT, keys=keys_B, method="encode"
    )

    def unembed(hidden: Array) -> Array:
        return model.apply({"params": params}, hidden, method="unembed")

    kwargs = dict(z_loss=z_loss, label_smoothing=label_smoothing, vocab_size=model.config.vocab_size)
    if not chunk:
        return cross_entropy(unembed(hidden_BxTxD), targets_BxT, **kwargs)
    return chunked_cross_entropy(unembed, hidden_BxTxD, targets_BxT, chunk=chunk, **kwargs)
