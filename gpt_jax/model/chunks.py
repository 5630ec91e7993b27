"""Attention in a loop over chunks of queries: small programs and O(chunk x T) memory, for long contexts.

A dense layer multiplies each chunk of queries with all keys; a banded one with the few chunks of keys its window
reaches, so that its time and memory are O(T w). The backward pass computes each chunk's scores again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from gpt_jax.model.attention import Mask, Variant, attend_pairs


def attend_chunks(
    q_BxTxHxK: Array,
    k_BxSxGxK: Array,
    v_BxSxGxK: Array,
    mask: Mask,
    variant: Variant,
    *,
    chunk: int,
    start: Array | int = 0,
) -> Array:
    """As `attend`, for the T queries at positions start, start + 1, ... of a sequence of S keys.

    Args:
      q_BxTxHxK: some of the sequence's queries, all of them by default. k_BxSxGxK, v_BxSxGxK: all keys and values.
      mask: with arrays over all S positions. variant: see Variant.
      chunk: queries at a time. start: position of the first query.

    Returns:
      [B, T, H, K].
    """
    B, T, H, K = q_BxTxHxK.shape
    S = k_BxSxGxK.shape[1]
    chunk = min(chunk, T)
    n = -(-T // chunk)
    segments = mask.segments_BxT
    q = _split(_pad(q_BxTxHxK, 0, n * chunk - T), n)
    q_segments = None
    if segments is not None:
        q_segments = lax.dynamic_slice_in_dim(_pad(segments, 0, n * chunk - T), start, n * chunk, axis=1)
        q_segments = _split(q_segments, n)
    reach = 0 if variant.window is None else -(-(variant.window - 1) // chunk)
    ahead = 0 if mask.kind == "causal" else reach
    banded = variant.window is not None and (reach + ahead + 1) * chunk < S
    keys = (k_BxSxGxK, v_BxSxGxK, segments, mask.prefix_BxT)
    fixed = None
    if banded:
        keys = jax.tree.map(lambda x: _neighbours(x, start, n, chunk, reach, ahead), keys)
    else:  # closed over: float32, so that the gradients of all chunks are added in it
        fixed = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, keys)
        keys = (None,) * 4

    def one(i, q, q_segments, keys):
        q_pos = start + i * chunk + jnp.arange(chunk)[:, None]
        if banded:
            k, v, k_segments, prefix = keys
            k_pos = start + (i - reach) * chunk + jnp.arange((reach + ahead + 1) * chunk)[None, :]
        else:
            k, v, k_segments, prefix = fixed
            k, v = k.astype(k_BxSxGxK.dtype), v.astype(v_BxSxGxK.dtype)
            k_pos = jnp.arange(S)[None, :]
        inside = (k_pos >= 0) & (k_pos < S) if banded else None
        return attend_pairs(
            q, k, v, q_pos, k_pos, mask.kind, variant, q_segments, k_segments, prefix, inside, start + i * chunk
        )

    def body(_, xs):
        return None, jax.checkpoint(one)(*xs)

    _, out = lax.scan(body, None, (jnp.arange(n), q, q_segments, keys))
    return jnp.swapaxes(out, 0, 1).reshape(B, n * chunk, H, K)[:, :T]


def _pad(x: Array, before: int, after: int) -> Array:
    return jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2)) if before or after else x


def _split(x: Array, n: int) -> Array:
    """[B, n c, ...] -> [n, B, c, ...]."""
    return jnp.swapaxes(x.reshape(x.shape[0], n, -1, *x.shape[2:]), 0, 1)


def _neighbours(x: Array, start: Array | int, n: int, chunk: int, reach: int, ahead: int) -> Array:
    """[B, S, ...] -> [n, B, (reach + 1 + ahead) chunk, ...]: each chunk from `start` on with those around it."""
    length = (n + reach + ahead) * chunk
    padded = _pad(x, reach * chunk, length)
    padded = lax.dynamic_slice_in_dim(padded, start, length, axis=1)
    blocks = _split(padded, n + reach + ahead)
    return jnp.concatenate([blocks[j : j + n] for j in range(reach + ahead + 1)], axis=2)
