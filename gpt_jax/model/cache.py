"""The key/value cache (GPT-2's 'past'): an argument and a result of the model, never hidden state."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from gpt_jax.model.config import ModelConfig


@struct.dataclass
class Cache:
    """Keys and values of every layer in S slots.

    An array per layer, rows and heads (N = B * G) in one axis before the slots: a step then writes one slot in place
    and reads each layer where it lies. Slots are a ring: the token of index i goes to slot i mod S, where it takes the
    place of one that no query needs any more. Several tokens written at once must not run across the ring's end.

    Attributes:
      k_NxSxK, v_NxSxK: for each layer keys (already rotated where positions are rotary) and values.
      positions_BxS: position of the token in each slot; -1 where the slot holds none (padding, not yet written).
      index: of the next token of every row.
      ring_BxR: the same as positions_BxS for banded layers where they have fewer slots; None where they have as many.
    """

    k_NxSxK: tuple[Array, ...]
    v_NxSxK: tuple[Array, ...]
    positions_BxS: Array
    index: Array
    ring_BxR: Array | None = None

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int, ring: int = 0) -> Cache:
        """A cache without tokens.

        Args:
          slots: of every layer. ring: of banded layers, if that is fewer (`ring_slots`); 0 gives them `slots` too.
        """
        ring = ring if 0 < ring < slots and "band" in config.pattern else 0
        sizes = [ring if ring and kind == "band" else slots for kind in config.layer_kinds]
        k, v = (
            tuple(jnp.zeros((batch * config.kv_heads, size, config.key_size), config.dtype) for size in sizes)
            for _ in "kv"
        )
        none = jnp.full((batch, slots), -1, jnp.int32)
        return cls(k, v, none, jnp.zeros((), jnp.int32), none[:, :ring] if ring else None)

    def extend(self, positions_BxT: Array) -> Cache:
        """Enters the positions of T new tokens (-1 for padding); layers then `write` their keys and values."""
        new = positions_BxT.astype(jnp.int32)

        def put(positions: Array) -> Array:
            return lax.dynamic_update_slice(positions, new, (0, self.index % positions.shape[1]))

        ring = None if self.ring_BxR is None else put(self.ring_BxR)
        return self.replace(positions_BxS=put(self.positions_BxS), ring_BxR=ring)

    def positions(self, layer: int) -> Array:
        """Returns the position of the token in each slot of a layer, [B, its slots]."""
        is_ring = self.ring_BxR is not None and self.k_NxSxK[layer].shape[1] == self.ring_BxR.shape[1]
        return self.ring_BxR if is_ring else self.positions_BxS

    def take(self, rows: Array) -> Cache:
        """Returns a cache whose row i is row rows[i] of this one."""
        B = self.positions_BxS.shape[0]

        def heads(x_NxSxK: Array) -> Array:
            N, S, K = x_NxSxK.shape
            return x_NxSxK.reshape(B, N // B, S, K)[rows].reshape(-1, S, K)

        return self.replace(
            k_NxSxK=tuple(map(heads, self.k_NxSxK)),
            v_NxSxK=tuple(map(heads, self.v_NxSxK)),
            positions_BxS=self.positions_BxS[rows],
            ring_BxR=None if self.ring_BxR is None else self.ring_BxR[rows],
        )

    def write(self, layer: int, k_BxTxGxK: Array, v_BxTxGxK: Array) -> Cache:
        def put(layers: tuple[Array, ...], new_BxTxGxK: Array) -> tuple[Array, ...]:
            T, K = new_BxTxGxK.shape[1], new_BxTxGxK.shape[3]
            new_NxTxK = jnp.swapaxes(new_BxTxGxK, 1, 2).reshape(-1, T, K)
            slot = self.index % layers[layer].shape[1]
            updated = lax.dynamic_update_slice(layers[layer], new_NxTxK, (0, slot, 0))
            return (*layers[:layer], updated, *layers[layer + 1 :])

        return self.replace(k_NxSxK=put(self.k_NxSxK, k_BxTxGxK), v_NxSxK=put(self.v_NxSxK, v_BxTxGxK))

    def read(self, layer: int) -> tuple[Array, Array]:
        """Returns the layer's keys and values, each [N, S, K]."""
        return self.k_NxSxK[layer], self.v_NxSxK[layer]

    def advance(self, tokens: int) -> Cache:
        return self.replace(index=self.index + tokens)


def ring_slots(config: ModelConfig, piece: int) -> int:
    """Slots that a banded layer needs if tokens come `piece` at a time (then one at a time): a multiple of `piece`.

    The first of a piece sees window - 1 keys before it, which the others must not overwrite.
    """
    return -(-(config.window - 1 + piece) // piece) * piece
