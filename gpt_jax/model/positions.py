"""Positions: rotary embeddings (Su et al. 2021) and ALiBi slopes (Press et al. 2022)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


class RopeScaling(NamedTuple):
    """How rotary frequencies are changed, so that a model reads more than the context it was trained on.

    Attributes:
      kind: 'none' | 'linear': position interpolation, RoPE at m / factor (Chen et al. 2023) | 'ntk': the base becomes
        base * factor^(K/(K-2)), so that the lowest frequency is interpolated and the highest stays | 'llama3': waves
        longer than original / low are interpolated, those shorter than original / high stay, with a blend between.
      factor: of the context. low, high, original: of llama3; the last is the context it was trained on.
    """

    kind: str = "none"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


UNSCALED = RopeScaling()


def rope_frequencies(size: int, base: float, scaling: RopeScaling = UNSCALED) -> Array:
    """Returns the angle per position of each pair of a head of `size`: base^(-2i/K), scaled; float32 [K/2]."""
    half = size // 2
    if scaling.kind == "ntk":
        base = base * scaling.factor ** (size / max(size - 2, 1))
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "llama3":
        waves = scaling.original / (2 * math.pi / frequency)  # that the original context holds
        kept = jnp.clip((waves - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
        return frequency * (kept + (1 - kept) / scaling.factor)
    return frequency


def rotate(x_BxTxHxK: Array, positions: Array, base: float, scaling: RopeScaling = UNSCALED) -> Array:
    """Rotates pairs (i, i + K/2) of each head by position * base^(-2i/K).

    Args:
      x_BxTxHxK: queries or keys.
      positions: [T] or [B, T] integers.
      base: rotary base. `scaling`: of the frequencies.
    """
    frequency = rope_frequencies(x_BxTxHxK.shape[-1], base, scaling)
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
