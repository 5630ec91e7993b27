"""The key/value cache (GPT-2's 'past'): an argument and a result of the model, never hidden state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from gpt_jax.model.config import ModelConfig


@struct.dataclass
class Cache:
    """Keys and values of every layer in S slots.

    Attributes:
      k_LxBxSxGxK, v_LxBxSxGxK: keys (already rotated where positions are rotary) and values.
      positions_BxS: position of the token in each slot; -1 where the slot holds none (padding, not yet written).
      index: the slot that the next token of every row goes to.
    """

    k_LxBxSxGxK: Array
    v_LxBxSxGxK: Array
    positions_BxS: Array
    index: Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int) -> Cache:
        shape = (config.num_layers, batch, slots, config.kv_heads, config.key_size)
        zeros = jnp.zeros(shape, config.dtype)
        positions = jnp.full((batch, slots), -1, jnp.int32)
        return cls(zeros, zeros, positions, jnp.zeros((), jnp.int32))

    def extend(self, positions_BxT: Array) -> Cache:
        """Enters the positions of T new tokens (-1 for padding); layers then `write` their keys and values."""
        positions = lax.dynamic_update_slice(self.positions_BxS, positions_BxT.astype(jnp.int32), (0, self.index))
        return self.replace(positions_BxS=positions)

    def write(self, layer: Array, k_BxTxGxK: Array, v_BxTxGxK: Array) -> Cache:
        at = (layer, 0, self.index, 0, 0)
        return self.replace(
            k_LxBxSxGxK=lax.dynamic_update_slice(self.k_LxBxSxGxK, k_BxTxGxK[None], at),
            v_LxBxSxGxK=lax.dynamic_update_slice(self.v_LxBxSxGxK, v_BxTxGxK[None], at),
        )

    def read(self, layer: Array) -> tuple[Array, Array]:
        """Returns the layer's keys and values, each [B, S, G, K]."""
        return (
            lax.dynamic_index_in_dim(self.k_LxBxSxGxK, layer, 0, keepdims=False),
            lax.dynamic_index_in_dim(self.v_LxBxSxGxK, layer, 0, keepdims=False),
        )

    def advance(self, tokens: int) -> Cache:
        return self.replace(index=self.index + tokens)


def cache_bytes(config: ModelConfig, batch: int, slots: int) -> int:
    """Memory of a cache, in bytes."""
    shapes = jax.eval_shape(lambda: Cache.empty(config, batch, slots))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
