"""What an analysis reads from a forward pass and what it puts in its place: an argument and a result, never state.

Without taps the traced program is the one that trains; with them the logits are the same bits, because what is read
is computed beside the path and what is put in its place is chosen elementwise.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

KINDS = ("residual", "attention", "heads", "attention_out", "mlp_out")


@struct.dataclass
class Taps:
    """Of a whole model the leading axis of every array is its layers; a block gets its own slice.

    Attributes:
      collect: what to return: residual [B, T, D] entering a block, attention [B, H, T, S] weights, heads [B, T, H, K]
        outputs before their projection, attention_out and mlp_out [B, T, D], what the sublayers add.
      gates_LxH: xi, times each head's output; None is 1. fill_LxHxK: what a head gives in the part 1 - xi; None is 0.
      residual_LxBxTxD, residual_where_LxBxT: what enters a block in place of its input, and where.
      heads_LxBxTxHxK, heads_where_LxBxTxH: the same of heads' outputs, before the gates.
    """

    collect: tuple[str, ...] = struct.field(pytree_node=False, default=())
    gates_LxH: Array | None = None
    fill_LxHxK: Array | None = None
    residual_LxBxTxD: Array | None = None
    residual_where_LxBxT: Array | None = None
    heads_LxBxTxHxK: Array | None = None
    heads_where_LxBxTxH: Array | None = None

    def stacked(self, period: int) -> Taps:
        """[L, ...] -> [L / period, period, ...], as the scan over repetitions of the pattern reads it."""
        return jax.tree.map(lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:]), self)

    def of(self, index: int) -> Taps:
        """The slice of one block of a repetition."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def enter(self, x_BxTxD: Array) -> Array:
        """What enters a block (its slice)."""
        if self.residual_LxBxTxD is None:
            return x_BxTxD
        where = self.residual_where_LxBxT[..., None]
        return jnp.where(where, self.residual_LxBxTxD.astype(x_BxTxD.dtype), x_BxTxD)

    def through_heads(self, out_BxTxHxK: Array) -> Array:
        """Heads' outputs as patches and gates leave them (its slice)."""
        out, dtype = out_BxTxHxK, out_BxTxHxK.dtype
        if self.heads_LxBxTxHxK is not None:
            out = jnp.where(self.heads_where_LxBxTxH[..., None], self.heads_LxBxTxHxK.astype(dtype), out)
        if self.gates_LxH is not None:
            gates = self.gates_LxH[:, None].astype(dtype)
            out = out * gates
            if self.fill_LxHxK is not None:
                out = out + (1 - gates) * self.fill_LxHxK.astype(dtype)
        return out

    def kept(self, found: dict[str, Any]) -> dict[str, Any]:
        """Of what a block found, what was asked for."""
        return {name: found[name] for name in self.collect}
