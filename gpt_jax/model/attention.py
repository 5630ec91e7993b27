"""Attention under a structured mask: what a query may see is described, never written out as a [T, T] array.

`Mask` describes; `attend` lowers it by blocks of queries, so that the keys a causal or banded mask hides are never
multiplied. Within a block the remaining mask is a comparison of indices that the compiler fuses into the softmax.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from gpt_jax.errors import UserError, choose
from gpt_jax.model.derivatives import score, softmax, softmax_product
from gpt_jax.model.positions import alibi_slopes
from gpt_jax.model.random import dropout

HIDDEN = -1e30  # a score no softmax sees, finite so that a fully hidden row gives no NaN


@struct.dataclass
class Mask:
    """What a query may see.

    Attributes:
      kind: 'causal', 'bidirectional', or 'prefix' (causal, and tokens of the prefix are seen from everywhere).
      segments_BxT: document of each token, 0 for padding; tokens see only their own document. None: no documents.
      prefix_BxT: which tokens are prefix, booleans, for kind 'prefix'; each document of a row may have its own.
    """

    kind: str = struct.field(pytree_node=False, default="causal")
    segments_BxT: Array | None = None
    prefix_BxT: Array | None = None

    def __post_init__(self) -> None:
        choose("the kind of a mask", self.kind, ("causal", "bidirectional", "prefix"))
        if (self.kind == "prefix") != (self.prefix_BxT is not None):
            raise UserError(
                f"a mask of kind {self.kind!r} {'needs' if self.kind == 'prefix' else 'takes no'} prefix_BxT."
            )


@struct.dataclass
class Variant:
    """Per-layer choices: window (None is dense), soft-cap of scores, ALiBi, dropout and talking-head matrices."""

    window: int | None = struct.field(pytree_node=False, default=None)
    softcap: float = struct.field(pytree_node=False, default=0.0)
    alibi: bool = struct.field(pytree_node=False, default=False)
    dropout: float = struct.field(pytree_node=False, default=0.0)
    keys_B: Array | None = None
    mix_scores_HxH: Array | None = None
    mix_weights_HxH: Array | None = None


def attend(
    q_BxTxHxK: Array, k_BxTxGxK: Array, v_BxTxGxK: Array, mask: Mask, variant: Variant, *, block: int | None
) -> Array:
    """Scaled dot-product attention of a sequence with itself.

    Args:
      q_BxTxHxK, k_BxTxGxK, v_BxTxGxK: queries, keys and values; H is a multiple of G (grouped queries).
      mask: what a query may see. `variant`: see Variant.
      block: queries per block; None computes all [T, T] scores at once.

    Returns:
      [B, T, H, K].
    """
    T = q_BxTxHxK.shape[1]
    if block is None or block >= T:
        return _attend_block(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, 0, 0, mask, variant)
    block = max(block, -(-T // 64))  # at most 64 blocks to compile
    outputs = []
    starts = range(0, T, block)
    for start, q in zip(starts, lax.split(q_BxTxHxK, [min(block, T - s) for s in starts], axis=1), strict=True):
        low, high = _visible(start, start + q.shape[1], T, mask, variant)
        outputs.append(
            _attend_block(
                q,
                k_BxTxGxK[:, low:high],
                v_BxTxGxK[:, low:high],
                start,
                low,
                mask,
                variant,
            )
        )
    return jnp.concatenate(outputs, axis=1)


def attend_cache(
    q_BxTxHxK: Array,
    k_NxSxK: Array,
    v_NxSxK: Array,
    positions_BxT: Array,
    positions_BxS: Array,
    variant: Variant,
    *,
    causal: bool = True,
) -> Array:
    """Attention of new tokens to a cache: a key is seen if it holds a token (position >= 0) not after the query's.

    Not `causal`: later ones too, as the tokens of a prefix see each other. Keys and values have one leading axis,
    N = B * G (see Cache): products then read them where they lie.
    """
    B, T, H, K = q_BxTxHxK.shape
    N = k_NxSxK.shape[0]
    G = N // B
    q, s = positions_BxT[:, :, None], positions_BxS[:, None, :]
    allowed_BxTxS = jnp.broadcast_to(s >= 0, (B, T, s.shape[2]))
    if causal:
        allowed_BxTxS &= s <= q
    if variant.window is not None:
        allowed_BxTxS &= abs(q - s) < variant.window
    distance = abs(q - s) if variant.alibi else None
    scaled = q_BxTxHxK * jnp.asarray(1.0 / math.sqrt(K), q_BxTxHxK.dtype)
    q_NxQxK = jnp.swapaxes(scaled, 1, 2).reshape(N, -1, K)  # Q: the query heads of a key head x T
    scores = jnp.einsum("nqk,nsk->nqs", q_NxQxK, k_NxSxK, preferred_element_type=jnp.float32)
    weights = _weigh(scores.reshape(B, G, H // G, T, -1), allowed_BxTxS, distance, variant, 0)
    out = jnp.einsum("nqs,nsk->nqk", weights.reshape(N, (H // G) * T, -1).astype(v_NxSxK.dtype), v_NxSxK)
    return jnp.swapaxes(out.reshape(B, H, T, K), 1, 2)


def _visible(start: int, end: int, T: int, mask: Mask, variant: Variant) -> tuple[int, int]:
    """The range of keys that queries [start, end) may see at all."""
    before = start - variant.window + 1 if variant.window is not None else 0
    if mask.kind == "causal":
        return max(0, before), end
    after = end + variant.window - 1 if variant.window is not None else T
    return max(0, before), min(T, after)


def attention_weights(q_BxTxHxK: Array, k_BxTxGxK: Array, mask: Mask, variant: Variant) -> Array:
    """The weights [B, H, T, T] that `attend` gives the values, whatever computes them: for those who want to look."""
    B, T, H, K = q_BxTxHxK.shape
    G = k_BxTxGxK.shape[2]
    at, segments = jnp.arange(T), mask.segments_BxT
    allowed, distance = _allowed(at[:, None], at[None], mask.kind, variant, segments, segments, mask.prefix_BxT)
    scaled = (q_BxTxHxK * jnp.asarray(1.0 / math.sqrt(K), q_BxTxHxK.dtype)).reshape(B, T, G, H // G, K)
    scores = score(jnp.transpose(scaled, (0, 2, 3, 1, 4)), jnp.swapaxes(k_BxTxGxK, 1, 2))
    return _weigh(scores, allowed, distance, variant, 0).reshape(B, H, T, T)


def _attend_block(q, k, v, q_start: int, k_start: int, mask: Mask, variant: Variant) -> Array:
    T, S = q.shape[1], k.shape[1]
    q_pos, k_pos = q_start + jnp.arange(T)[:, None], k_start + jnp.arange(S)[None, :]
    kind = mask.kind
    if kind != "bidirectional" and T == 1 and k_start + S <= q_start + 1:
        kind = "bidirectional"  # one query after all of its keys: nothing to hide

    def cut(x, start, length):
        return None if x is None else x[:, start : start + length]

    return attend_pairs(
        q,
        k,
        v,
        q_pos,
        k_pos,
        kind,
        variant,
        cut(mask.segments_BxT, q_start, T),
        cut(mask.segments_BxT, k_start, S),
        cut(mask.prefix_BxT, k_start, S),
        None,
        q_start,
    )


def attend_pairs(
    q, k, v, q_pos, k_pos, kind: str, variant: Variant, q_segments, k_segments, k_prefix, inside, block_id
) -> Array:
    """Attention of some queries [B, T, H, K] to some keys and values [B, S, G, K].

    Args:
      q_pos, k_pos: [T, 1] and [1, S] positions. kind: of a Mask. q_segments, k_segments, k_prefix: [B, T or S] or None.
      inside: [1, S], which keys there are; None is all. block_id: tells the draws of one block of queries from others.
    """
    allowed, distance = _allowed(q_pos, k_pos, kind, variant, q_segments, k_segments, k_prefix, inside)
    return _softmax_attend(q, k, v, allowed, distance, variant, block_id)


def _allowed(
    q_pos, k_pos, kind: str, variant: Variant, q_segments, k_segments, k_prefix, inside=None
) -> tuple[Any, Any]:
    """What queries may see of keys, and their distances (ALiBi): broadcastable to [B, T, S], or None."""
    allowed: Any = None if inside is None else inside[None]

    def narrow(more):
        return more if allowed is None else allowed & more

    if kind != "bidirectional":
        seen = (k_pos <= q_pos)[None]
        allowed = narrow(seen | k_prefix[:, None] if kind == "prefix" else seen)
    if variant.window is not None:
        allowed = narrow((abs(q_pos - k_pos) < variant.window)[None])
    if q_segments is not None:
        q_seg, k_seg = q_segments[:, :, None], k_segments[:, None, :]
        allowed = narrow((q_seg == k_seg) & (k_seg > 0))
    return allowed, abs(q_pos - k_pos)[None] if variant.alibi else None


def _softmax_attend(q, k, v, allowed, distance, variant: Variant, block_id: int) -> Array:
    """q [B,T,H,K], k and v [B,S,G,K], allowed and distance broadcastable to [B,T,S] or None -> [B,T,H,K]."""
    B, T, H, K = q.shape
    G = k.shape[2]
    # Heads first, and products in this order: what is transposed then is queries, keys and values, never [T, S].
    q = (q * jnp.asarray(1.0 / math.sqrt(K), q.dtype)).reshape(B, T, G, H // G, K)
    q_BxGxRxTxK, k_BxGxSxK, v_BxGxSxK = jnp.transpose(q, (0, 2, 3, 1, 4)), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    scores = _mask(score(q_BxGxRxTxK, k_BxGxSxK), allowed, distance, variant)
    small = v.dtype == jnp.float16  # its slopes would vanish if divided by a row's sum
    if variant.mix_weights_HxH is None and variant.keys_B is None and not small:
        out_BxGxRxTxK = softmax_product(scores, v_BxGxSxK)
    else:
        weights = _normalize(scores, variant, block_id)
        out_BxGxRxTxK = lax.dot_general(weights.astype(v.dtype), v_BxGxSxK, (((4,), (2,)), ((0, 1), (0, 1))))
    return jnp.transpose(out_BxGxRxTxK, (0, 3, 1, 2, 4)).reshape(B, T, H, K)


def _weigh(scores: Array, allowed, distance, variant: Variant, block_id: int) -> Array:
    """Scores [B,G,R,T,S] -> attention weights of the same shape."""
    return _normalize(_mask(scores, allowed, distance, variant), variant, block_id)


def _mask(scores: Array, allowed, distance, variant: Variant) -> Array:
    """Scores [B,G,R,T,S] as the softmax sees them: capped, with ALiBi's slopes, mixed, hidden keys out."""
    if variant.softcap:
        scores = variant.softcap * jnp.tanh(scores / variant.softcap)
    if distance is not None:
        slopes = jnp.asarray(alibi_slopes(scores.shape[1] * scores.shape[2])).reshape(*scores.shape[1:3], 1, 1)
        scores = scores - slopes * distance[:, None, None].astype(jnp.float32)
    if variant.mix_scores_HxH is not None:
        scores = _mix(scores, variant.mix_scores_HxH)
    if allowed is not None:
        scores = jnp.where(allowed[:, None, None], scores, HIDDEN)
    return scores


def _normalize(scores: Array, variant: Variant, block_id: int) -> Array:
    """Softmax of masked scores, mixed between heads and dropped."""
    weights = softmax(scores)
    if variant.mix_weights_HxH is not None:
        weights = _mix(weights, variant.mix_weights_HxH)
    if variant.keys_B is not None:
        weights = dropout(weights, variant.dropout, jax.vmap(lambda k: jax.random.fold_in(k, block_id))(variant.keys_B))
    return weights


def _mix(x_BxGxRxTxS: Array, mixing_HxH: Array) -> Array:
    B, G, R, T, S = x_BxGxRxTxS.shape
    mixed = jnp.einsum("bhts,hi->bits", x_BxGxRxTxS.reshape(B, G * R, T, S), mixing_HxH.astype(jnp.float32))
    return mixed.reshape(B, G, R, T, S)
