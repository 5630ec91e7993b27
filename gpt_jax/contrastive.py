"""Contrastive search over the key/value cache (Su et al. 2022): likely tokens whose states repeat nothing.

Of the k likeliest tokens v the one of largest (1 - alpha) p(v) - alpha max_j cos(h_v, h_j), h_v being the model's last
hidden state at v and h_j those at all tokens before. alpha = 0 is greedy. It draws nothing.
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
from gpt_jax.generation import batches_for_search, check_prompts, positions_of, slots_for
from gpt_jax.model import Cache, Transformer
from gpt_jax.model.cache import ring_slots
from gpt_jax.model.decoding import decoding_params


@struct.dataclass
class Search:
    """The search after `count` new tokens.

    Attributes:
      out_BxN: the new tokens. states_BxSxD: unit hidden states of the tokens in each slot, 0 where there is none.
      logits_BxV: after the last token. cache: of all tokens so far. done_B: rows that have ended.
    """

    out_BxN: Array
    states_BxSxD: Array
    logits_BxV: Array
    cache: Cache
    done_B: Array
    count: Array


def contrastive_search(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    k: int = 4,
    alpha: float = 0.6,
    eot: int | None = None,
) -> list[list[int]]:
    """Returns the new ids of each prompt, without eot.

    Args:
      model, params: the parameters of the model's own root. prompts: token ids; an empty one begins with `eot`.
      max_tokens: generated per prompt at most. k: candidates for each token. alpha: weight of the likeness, in [0, 1].
      eot: the id that ends a text; None never ends early.

    Raises:
      UserError: a setting out of range, or a prompt that does not fit.
    """
    if not 1 <= k <= model.config.vocab_size:
        raise UserError(f"k is {k}; contrastive search looks at 1 to {model.config.vocab_size} candidates.")
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}; the weight of the likeness must be in [0, 1].")
    ids = check_prompts(model, prompts, max_tokens, eot)
    prepared = decoding_params(model.config, params, k)
    out: list[list[int]] = [[] for _ in ids]
    limits = (np.int32(max_tokens), np.float32(alpha), np.int32(-1 if eot is None else eot))
    for rows, tokens, lengths in batches_for_search(ids, k):
        found = np.asarray(_search(model, k, slots_for(max_tokens), prepared, tokens, lengths, *limits))
        for i, row in enumerate(rows):
            new = found[i, :max_tokens].tolist()
            out[row] = new[: new.index(eot)] if eot in new else new
    return out


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(
    model: Transformer,
    k: int,
    size: int,
    params: Any,
    tokens_BxT: Array,
    lengths_B: Array,
    max_tokens: Array,
    alpha: Array,
    eot: Array,
) -> Array:
    B, T = tokens_BxT.shape
    V = model.config.vocab_size
    positions = positions_of(lengths_B, T)

    def run(tokens: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
        return model.apply({"params": params}, tokens, positions=positions, cache=cache, method="encode")

    def logits_of(hidden: Array) -> Array:
        return model.apply({"params": params}, hidden, method="unembed")[:, :V]

    hidden, cache = run(tokens_BxT, positions, Cache.empty(model.config, B, T + size, ring_slots(model.config, T)))
    states = jnp.where(positions[:, :, None] >= 0, _unit(hidden), 0.0)
    start = Search(
        out_BxN=jnp.zeros((B, size), jnp.int32),
        states_BxSxD=jnp.pad(states, ((0, 0), (0, size), (0, 0))),
        logits_BxV=logits_of(hidden[:, -1]),
        cache=cache,
        done_B=lengths_B == 0,
        count=jnp.zeros((), jnp.int32),
    )

    def more(state: Search) -> Array:
        return (state.count < max_tokens) & ~jnp.all(state.done_B)

    def step(state: Search) -> Search:
        p_Bxk, token_Bxk = lax.top_k(jax.nn.softmax(state.logits_BxV), k)
        position = jnp.repeat(lengths_B + state.count, k)[:, None]
        hidden, cache = run(token_Bxk.reshape(-1, 1), position, state.cache.take(jnp.repeat(jnp.arange(B), k)))
        unit_BxkxD = _unit(hidden).reshape(B, k, -1)
        slot = jnp.arange(T + size)
        there = (slot >= T - lengths_B[:, None]) & (slot < T + state.count)
        likeness = jnp.einsum("bkd,bsd->bks", unit_BxkxD, state.states_BxSxD)
        likeness = jnp.max(jnp.where(there[:, None], likeness, -1.0), axis=-1)
        best = jnp.argmax((1.0 - alpha) * p_Bxk - alpha * likeness, axis=1)
        rows = jnp.arange(B) * k + best
        token = jnp.where(state.done_B, jnp.maximum(eot, 0), token_Bxk[jnp.arange(B), best])
        return Search(
            out_BxN=lax.dynamic_update_slice(state.out_BxN, token[:, None], (0, state.count)),
            states_BxSxD=lax.dynamic_update_slice(
                state.states_BxSxD, unit_BxkxD[jnp.arange(B), best][:, None], (0, T + state.count, 0)
            ),
            logits_BxV=logits_of(hidden[rows, 0]),
            cache=cache.take(rows),
            done_B=state.done_B | (token == eot),
            count=state.count + 1,
        )

    return lax.while_loop(more, step, start).out_BxN


def _unit(x: Array) -> Array:
    """x [..., D] / its length, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
