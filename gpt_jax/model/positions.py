"""Positions: rotary embeddings (Su et al. 2021) and ALiBi slopes (Press et al. 2022)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array


def rotate(x_BxTxHxK: Array, positions: Array, base: float) -> Array:
    """Rotates pairs (i, i + K/2) of each head by position * base^(-2i/K).

    Args:
      x_BxTxHxK: queries or keys.
      positions: [T] or [B, T] integers.
      base: rotary base.
    """
    half = x_BxTxHxK.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None] * frequency
    angle = angle[..., None, :]  # [..., T, 1, K/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x1, x2 = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return rotated.astype(x_BxTxHxK.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slopes 2^(-8h/H), h = 1..H; for H not a power of two, the paper's interpolation."""
    power = 2 ** int(np.floor(np.log2(num_heads)))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    slopes += [2 ** (-4 * (2 * h + 1) / power) for h in range(num_heads - power)]
    return np.asarray(slopes, np.float32)
