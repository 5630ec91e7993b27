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

    An array per layer, rows and heads (N = B * G) in one axis before the slots: a step then writes one slot in place
    and reads each layer where it lies.

    Attributes:
      k_NxSxK, v_NxSxK: for each layer keys (already rotated where positions are rotary) and values.
      positions_BxS: position of the token in each slot; -1 where the slot holds none (padding, not yet written).
      index: the slot that the next token of every row goes to.
    """

    k_NxSxK: tuple[Array, ...]
    v_NxSxK: tuple[Array, ...]
    positions_BxS: Array
    index: Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int) -> Cache:
        shape = (batch * config.kv_heads, slots, config.key_size)
        k, v = (tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers)) for _ in "kv")
        return cls(k, v, jnp.full((batch, slots), -1, jnp.int32), jnp.zeros((), jnp.int32))

    def extend(self, positions_BxT: Array) -> Cache:
        """Enters the positions of T new tokens (-1 for padding); layers then `write` their keys and values."""
        positions = lax.dynamic_update_slice(self.positions_BxS, positions_BxT.astype(jnp.int32), (0, self.index))
        return self.replace(positions_BxS=positions)

    def write(self, layer: int, k_BxTxGxK: Array, v_BxTxGxK: Array) -> Cache:
        def put(layers: tuple[Array, ...], new_BxTxGxK: Array) -> tuple[Array, ...]:
            T, K = new_BxTxGxK.shape[1], new_BxTxGxK.shape[3]
            new_NxTxK = jnp.swapaxes(new_BxTxGxK, 1, 2).reshape(-1, T, K)
            updated = lax.dynamic_update_slice(layers[layer], new_NxTxK, (0, self.index, 0))
            return (*layers[:layer], updated, *layers[layer + 1 :])

        return self.replace(k_NxSxK=put(self.k_NxSxK, k_BxTxGxK), v_NxSxK=put(self.v_NxSxK, v_BxTxGxK))

    def read(self, layer: int) -> tuple[Array, Array]:
        """Returns the layer's keys and values, each [N, S, K]."""
        return self.k_NxSxK[layer], self.v_NxSxK[layer]

    def advance(self, tokens: int) -> Cache:
        return self.replace(index=self.index + tokens)


def cache_bytes(config: ModelConfig, batch: int, slots: int) -> int:
    """Memory of a cache, in bytes."""
    shapes = jax.eval_shape(lambda: Cache.empty(config, batch, slots))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
