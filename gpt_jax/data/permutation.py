"""A permutation without state: the image of an index in closed form, for any size and seed."""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """Returns a 64-bit hash of integers (SplitMix64's finalizer; Steele et al. 2014)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permute(index: np.ndarray | int, size: int, seed: int) -> np.ndarray:
    """Returns the images of `index` under a pseudo-random permutation of range(size), without making it.

    A balanced Feistel network on the next even number of bits, walked until it lands in the range (Black and Rogaway,
    Ciphers with Arbitrary Finite Domains, 2002): a bijection for every size and seed.

    Args:
      index: integers in [0, size), any shape.
      size: at least 1.
      seed: chooses the permutation.
    """
    index = np.asarray(index, np.int64)
    if index.size and not (0 <= index.min() and index.max() < size):
        raise IndexError(f"index out of range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    keys = [np.uint64(mix(seed, half, r)) for r in range(6)]

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & low
        for key in keys:
            y = (right + key) * np.uint64(0xBF58476D1CE4E5B9)
            y ^= y >> np.uint64(32)
            y *= np.uint64(0x94D049BB133111EB)
            y ^= y >> np.uint64(29)
            left, right = right, left ^ (y & low)
        return (left << np.uint64(half)) | right

    with np.errstate(over="ignore"):
        out = network(index.astype(np.uint64).ravel())
        outside = np.flatnonzero(out >= size)
        while outside.size:
            out[outside] = network(out[outside])
            outside = outside[out[outside] >= size]
    return out.astype(np.int64).reshape(index.shape)
