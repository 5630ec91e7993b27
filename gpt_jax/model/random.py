"""Randomness with a key per row, so that no draw depends on how a batch is cut or placed."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
from jax import Array


def fold_name(keys: Array, name: str) -> Array:
    """Returns keys ([B] or scalar, typed) that belong to `name`: each use of a key folds its own name."""
    return fold(keys, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def fold(keys: Array, number: Array | int) -> Array:
    """`fold_in` over a vector of keys."""
    if keys.ndim == 0:
        return jax.random.fold_in(keys, number)
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def dropout(x_Bx: Array, rate: float, keys_B: Array | None) -> Array:
    """Inverted dropout of each row under its own key; the identity when `keys_B` is None or the rate is 0."""
    if keys_B is None or rate == 0.0:
        return x_Bx
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x_Bx.shape[1:]))(keys_B)
    return jnp.where(keep, x_Bx / (1.0 - rate), 0.0).astype(x_Bx.dtype)
