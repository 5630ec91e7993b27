"""Per-token losses: cross-entropy with z-loss and label smoothing, whole or in chunks of the tokens; of a yes or no."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax


def cross_entropy(
    logits: Array, targets: Array, *, z_loss: float = 0.0, label_smoothing: float = 0.0, vocab_size: int = 0
) -> tuple[Array, Array]:
    """Cross-entropy in nats of each token.

    loss = -log q . log softmax(logits) + z_loss * logsumexp(logits)^2 (PaLM, section 5), with
    q = (1 - s) onehot(target) + s / vocab_size for label smoothing s (Szegedy et al. 2016).

    The backward pass recomputes the softmax from the logits, so that one [..., V] buffer is kept and not two.

    Args:
      logits: [..., V] float32; columns from `vocab_size` on are padding and must already be about -1e30.
      targets: [...] integers.
      z_loss, label_smoothing: coefficients; 0 is off.
      vocab_size: unpadded columns; 0 means all.

    Returns:
      (loss [...], nll [...]): the loss to train on, and the plain negative log-likelihood (no gradient).
    """
    loss, nll = _cross_entropy(logits, targets, z_loss, label_smoothing, vocab_size or logits.shape[-1])
    return loss, lax.stop_gradient(nll)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _cross_entropy(logits, targets, z_loss, smoothing, vocab_size):
    return _forward(logits, targets, z_loss, smoothing, vocab_size)[0]


def _forward(logits, targets, z_loss, smoothing, vocab_size):
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = lse - target
    loss = nll
    if smoothing:
        real = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < vocab_size
        mean = jnp.sum(jnp.where(real, logits, 0.0), axis=-1) / vocab_size
        loss = lse - (1.0 - smoothing) * target - smoothing * mean
    if z_loss:
        loss = loss + z_loss * jnp.square(lse)
    return (loss, nll), (logits, targets, lse)


def _backward(z_loss, smoothing, vocab_size, residuals, cotangents):
    logits, targets, lse = residuals
    g = cotangents[0][..., None]
    column = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    probability = jnp.exp(logits - lse[..., None])
    slope = 1.0 + 2.0 * z_loss * lse[..., None] if z_loss else 1.0
    wanted = jnp.where(column == targets[..., None], 1.0 - smoothing, 0.0)
    if smoothing:
        wanted = wanted + jnp.where(column < vocab_size, smoothing / vocab_size, 0.0)
    return g * (slope * probability - wanted), None


_cross_entropy.defvjp(_forward, _backward)


def chunked_cross_entropy(unembed, hidden: Array, targets: Array, *, chunk: int, **kwargs) -> tuple[Array, Array]:
    """`cross_entropy(unembed(hidden), targets)` without ever holding all logits: chunks of tokens, recomputed backward.

    Slower where the logits fit; for large vocabularies and long contexts on accelerators. Every chunk has tokens of
    every row, evenly spread over it: where a mesh cuts rows or their tokens, each device has its part of each chunk.

    Args:
      unembed: hidden [..., D] -> logits [..., V]; parameters are closed over.
      hidden, targets: [..., T, D] and [..., T]; any number of tokens.
      chunk: tokens at a time, at least one of each row.

    Returns:
      (loss, nll), each [..., T].
    """
    *lead, T, _ = hidden.shape
    width = min(T, max(1, chunk // math.prod(lead)))
    n = -(-T // width)
    at = len(lead)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, n * width - T if axis == at else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*lead, width, n, *x.shape[at + 1 :]), at + 1, 0)

    @jax.checkpoint
    def body(_, xs):
        return None, cross_entropy(unembed(xs[0]), xs[1], **kwargs)

    _, out = lax.scan(body, None, (cut(hidden), cut(targets)))
    return tuple(jnp.moveaxis(x, 0, -1).reshape(*lead, n * width)[..., :T] for x in out)


def binary_cross_entropy(scores: Array, labels: Array) -> Array:
    """-log of the probability that sigmoid(score) gives to each label, in nats.

    Args:
      scores: any shape, the logits of a yes. labels: of the same shape, 0 or 1 (or bool).
    """
    return jax.nn.softplus(scores) - scores * labels
