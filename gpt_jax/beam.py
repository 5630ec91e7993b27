"""Beam search over the key/value cache: the hypotheses of highest score log P / ((5 + n) / 6)^alpha (Wu et al. 2016).

n counts the generated tokens, the 'eot' that ends a hypothesis included. A hypothesis that reaches max_tokens without
one competes as it is. With as many beams as there are prefixes the search is exhaustive.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from gpt_jax.errors import UserError
from gpt_jax.generation import batches_for_search, bucket, check_prompts, positions_of
from gpt_jax.model import Cache, Transformer
from gpt_jax.model.cache import ring_slots
from gpt_jax.model.decoding import decoding_params

_WORST = -1e30


@struct.dataclass
class Beams:
    """The search after `count` new tokens, of B prompts with W beams each.

    Attributes:
      tokens_BxWxN, logps_BxW: live hypotheses and their log-probabilities.
      ended_BxWxN, scores_BxW, lengths_BxW: the best ended ones, their scores (penalised) and their lengths without eot.
      cache: of B * W rows.
    """

    tokens_BxWxN: Array
    logps_BxW: Array
    ended_BxWxN: Array
    scores_BxW: Array
    lengths_BxW: Array
    cache: Cache
    count: Array


def length_penalty(n: Any, alpha: float) -> Any:
    """((5 + n) / 6)^alpha."""
    return ((5.0 + n) / 6.0) ** alpha


def beam_search(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    beams: int = 4,
    alpha: float = 0.6,
    eot: int | None = None,
    results: int = 1,
) -> list[list[tuple[list[int], float]]]:
    """Returns the best continuations of each prompt, (ids without eot, score) each, best first.

    Args:
      model, params: the parameters of the model's own root. prompts: token ids; an empty one begins with `eot`.
      max_tokens: generated per prompt at most. beams: hypotheses kept. alpha: of the length penalty; 0 is off.
      eot: the id that ends a text; None never ends early. results: hypotheses returned, at most `beams`.

    Raises:
      UserError: a setting out of range, or a prompt that does not fit.
    """
    if beams < 1 or not 1 <= results <= beams:
        raise UserError(f"beams is {beams} and results {results}; 1 <= results <= beams is needed.")
    if not 0 <= alpha < float("inf"):
        raise UserError(f"the length penalty is {alpha}; it must be a number of at least 0.")
    ids = check_prompts(model, prompts, max_tokens, eot)
    prepared = decoding_params(model.config, params, beams)
    out: list[list[tuple[list[int], float]]] = [[] for _ in ids]
    size = bucket(max_tokens, least=8)
    limits = (np.int32(max_tokens), np.float32(alpha), np.int32(-1 if eot is None else eot))
    for rows, tokens, lengths in batches_for_search(ids, beams):
        lengths = np.maximum(lengths, 1)  # of rows without a prompt
        final = _search(model, beams, size, prepared, tokens, lengths, *limits)
        texts, scores, found = jax.device_get((final.ended_BxWxN, final.scores_BxW, final.lengths_BxW))
        for i, row in enumerate(rows):
            kept = [w for w in range(beams) if scores[i, w] > _WORST / 2][:results]
            out[row] = [(texts[i, w, : found[i, w]].tolist(), float(scores[i, w])) for w in kept]
    return out


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(
    model: Transformer,
    W: int,
    size: int,
    params: Any,
    tokens_BxT: Array,
    lengths_B: Array,
    max_tokens: Array,
    alpha: Array,
    eot: Array,
) -> Beams:
    B, T = tokens_BxT.shape
    V = model.config.vocab_size
    positions = positions_of(lengths_B, T)

    def logits_of(hidden: Array) -> Array:
        logits = model.apply({"params": params}, hidden[:, -1], method="unembed")[:, :V]
        return jax.nn.log_softmax(logits)

    cache = Cache.empty(model.config, B, T + size, ring_slots(model.config, T))
    hidden, cache = model.apply({"params": params}, tokens_BxT, positions=positions, cache=cache, method="encode")
    # All beams begin as the same one: but the first, none counts.
    first = jnp.where(jnp.arange(W) == 0, 0.0, _WORST)
    start = Beams(
        tokens_BxWxN=jnp.zeros((B, W, size), jnp.int32),
        logps_BxW=jnp.broadcast_to(first, (B, W)).astype(jnp.float32),
        ended_BxWxN=jnp.zeros((B, W, size), jnp.int32),
        scores_BxW=jnp.full((B, W), _WORST, jnp.float32),
        lengths_BxW=jnp.zeros((B, W), jnp.int32),
        cache=cache.take(jnp.repeat(jnp.arange(B), W)),
        count=jnp.zeros((), jnp.int32),
    )
    logp = jnp.repeat(logits_of(hidden), W, axis=0).reshape(B, W, V)
    state = _extend(start, logp, max_tokens, alpha, eot)

    def more(state: Beams) -> Array:
        # The best that a live one can still score: its probability only falls, its penalty grows to the last token's.
        best = jnp.max(state.logps_BxW, axis=1) / length_penalty(max_tokens, alpha)
        return (state.count < max_tokens) & jnp.any(best > jnp.min(state.scores_BxW, axis=1))

    def step(state: Beams) -> Beams:
        last = lax.dynamic_index_in_dim(state.tokens_BxWxN, state.count - 1, 2, keepdims=False).reshape(B * W, 1)
        position = jnp.repeat(lengths_B + state.count - 1, W)[:, None]
        hidden, cache = model.apply({"params": params}, last, positions=position, cache=state.cache, method="encode")
        return _extend(state.replace(cache=cache), logits_of(hidden).reshape(B, W, V), max_tokens, alpha, eot)

    return lax.while_loop(more, step, state)


def _extend(state: Beams, logp_BxWxV: Array, max_tokens: Array, alpha: Array, eot: Array) -> Beams:
    """Takes the best continuations of the live hypotheses by one token; what ends joins the ended ones."""
    B, W, V = logp_BxWxV.shape
    candidates = (state.logps_BxW[:, :, None] + logp_BxWxV).reshape(B, W * V)
    values, at = lax.top_k(candidates, min(2 * W, W * V))  # at most W of them end: W live ones remain
    parents, tokens = at // V, (at % V).astype(jnp.int32)
    count = state.count + 1
    texts = jnp.take_along_axis(state.tokens_BxWxN, parents[:, :, None], axis=1)
    texts = lax.dynamic_update_slice_in_dim(texts, tokens[:, :, None], state.count, axis=2)
    is_end = tokens == eot
    ends = is_end | (count >= max_tokens)
    scores = jnp.where(ends & (values > _WORST / 2), values / length_penalty(count, alpha), _WORST)
    lengths = jnp.where(is_end, count - 1, count)
    both = [
        jnp.concatenate(pair, axis=1)
        for pair in ((state.scores_BxW, scores), (state.ended_BxWxN, texts), (state.lengths_BxW, lengths))
    ]
    best, chosen = lax.top_k(both[0], W)
    alive, kept = lax.top_k(jnp.where(is_end, _WORST, values), W)
    rows = (jnp.arange(B)[:, None] * W + jnp.take_along_axis(parents, kept, axis=1)).reshape(-1)
    return state.replace(
        tokens_BxWxN=jnp.take_along_axis(texts, kept[:, :, None], axis=1),
        logps_BxW=jnp.maximum(alive, _WORST),
        ended_BxWxN=jnp.take_along_axis(both[1], chosen[:, :, None], axis=1),
        scores_BxW=best,
        lengths_BxW=jnp.take_along_axis(both[2], chosen, axis=1),
        cache=state.cache.take(rows),
        count=count,
    )
