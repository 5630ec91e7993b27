"""Continuous batching: a finished request's row goes to the next prompt while the others go on.

All rows write the same slot of the cache, which is a ring (gpt_jax/model/cache.py): the prompt of a new request is laid
into the slots just before the present one, and what its row held before is marked empty. A request draws as in
`generate`, under its own key folded with the position, so that its tokens depend neither on its batch nor on when it
came in.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from gpt_jax.errors import UserError
from gpt_jax.generation import (
    MAX_ROWS,
    bucket,
    check_prompts,
    enter_pieces,
    make_requests,
    prefill_piece,
    slots_for,
)
from gpt_jax.model import Cache, Transformer
from gpt_jax.model.cache import ring_slots
from gpt_jax.model.decoding import decoding_params
from gpt_jax.sampling import Filters, Sampling, penalise, sample_token

_CHUNK = 16  # tokens between two looks at what has finished


@struct.dataclass
class Rows:
    """Requests in flight.

    Attributes:
      token_B, position_B: the newest token of each and its position; it is not in the cache yet.
      left_B: tokens that may still be drawn. done_B: rows without a request, or with one that has ended.
      keys_B: one key per request. seen_BxV: tokens that are there, for the repetition penalty ([B, 0] without).
      out_BxC, logprobs_BxC: what was drawn since the last look, `count` tokens of each.
    """

    token_B: Array
    position_B: Array
    left_B: Array
    done_B: Array
    keys_B: Array
    seen_BxV: Array
    cache: Cache
    out_BxC: Array
    logprobs_BxC: Array
    count: Array


def generate_continuously(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    eot: int | None = None,
    seeds: Sequence[int] | None = None,
    rows: int = MAX_ROWS,
    ended: Callable[[int, list[int]], bool] | None = None,
) -> Iterator[tuple[int, list[int], list[float]]]:
    """Continues prompts, `rows` of them at a time, and yields each when it has finished.

    Args:
      model, params, prompts, max_tokens, sampling, eot, seeds: as in `generate`.
      ended: (index of the prompt, its newest tokens) -> whether its text ends here (a stop string was found).

    Yields:
      (index of the prompt, new ids without eot, their log-probabilities under the model), in the order they finish.

    Raises:
      UserError: as `generate`; fewer rows than one.
    """
    if rows < 1:
        raise UserError(f"rows is {rows}; at least one prompt is continued at a time.")
    ids = check_prompts(model, prompts, max_tokens, eot)
    seeds = list(seeds) if seeds is not None else list(range(len(ids)))
    sampling, longest = sampling or Sampling(), max(map(len, ids), default=1)
    B = bucket(min(rows, max(1, len(ids))))
    slots = bucket(longest, least=16) + slots_for(max_tokens)
    params = decoding_params(model.config, params, B)
    filters, end = sampling.filters(), np.int32(-1 if eot is None else eot)
    state = _empty(model, B, slots, filters.repetition_penalty is not None)
    queue = collections.deque(range(len(ids)))
    owner: list[int | None] = [None] * B
    texts: dict[int, tuple[list[int], list[float]]] = {}
    while queue or any(index is not None for index in owner):
        free = [row for row in range(min(B, rows)) if owner[row] is None][: len(queue)]
        if free:
            new = [queue.popleft() for _ in free]
            for row, index in zip(free, new, strict=True):
                owner[row], texts[index] = index, ([], [])
            requests = make_requests([ids[i] for i in new], [seeds[i] for i in new], sampling, eot)
            places = np.full(len(requests.lengths_B), B, np.int32)
            places[: len(free)] = free
            state = _admit(model, params, state, requests, places, np.int32(max_tokens))
        else:
            state = _run(model, params, state, filters, end, bool(queue))
        count = int(state.count)
        tokens, scores = np.asarray(state.out_BxC[:, :count]), np.asarray(state.logprobs_BxC[:, :count])
        stopped = np.array(state.done_B)
        for row, index in enumerate(owner):
            if index is None or (free and row not in free):
                continue
            text, values = texts[index]
            fresh, over = tokens[row].tolist()[: max_tokens - len(text)], False
            if eot in fresh:
                fresh, over = fresh[: fresh.index(eot)], True
            text += fresh
            values += scores[row].tolist()[: len(fresh)]
            over = over or len(text) >= max_tokens
            if (ended is not None and ended(index, fresh)) or over:
                owner[row], stopped[row] = None, True
                yield index, *texts.pop(index)
        state = state.replace(done_B=stopped, count=np.int32(0))


def _empty(model: Transformer, B: int, slots: int, penalty: bool) -> Rows:
    config = model.config
    return Rows(
        token_B=jnp.zeros(B, jnp.int32),
        position_B=jnp.zeros(B, jnp.int32),
        left_B=jnp.zeros(B, jnp.int32),
        done_B=jnp.ones(B, bool),
        keys_B=jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))(jnp.zeros(B, jnp.uint32)),
        seen_BxV=jnp.zeros((B, config.vocab_size if penalty else 0), bool),
        cache=Cache.empty(config, B, slots, ring_slots(config, 1)),
        out_BxC=jnp.zeros((B, _CHUNK), jnp.int32),
        logprobs_BxC=jnp.zeros((B, _CHUNK), jnp.float32),
        count=jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def _admit(model: Transformer, params: Any, state: Rows, requests: Any, rows_n: Array, max_tokens: Array) -> Rows:
    """Runs the prompts of new requests, lays them into their rows (row B: none) and draws the first token of each."""
    n, T = requests.tokens_BxT.shape
    positions = jnp.arange(T) - (T - requests.lengths_B)[:, None]
    positions = jnp.where(positions >= 0, positions, -1)
    piece = prefill_piece(T)
    cache = Cache.empty(model.config, n, T)
    cache = enter_pieces(model, params, requests.tokens_BxT, positions, cache, piece)
    hidden, cache = model.apply(
        {"params": params},
        requests.tokens_BxT[:, -piece:],
        positions=positions[:, -piece:],
        cache=cache,
        method="encode",
    )
    seen = jnp.zeros((n, state.seen_BxV.shape[1]), bool)
    if seen.shape[1]:
        seen = seen.at[jnp.arange(n)[:, None], requests.tokens_BxT].max(positions >= 0)
    token, logprob, seen = _draw(
        model, params, hidden[:, -1], requests.filters, requests.keys_B, requests.lengths_B, seen
    )

    def put(old: Array, new: Array) -> Array:
        return old.at[rows_n].set(new, mode="drop")

    return state.replace(
        token_B=put(state.token_B, token),
        position_B=put(state.position_B, requests.lengths_B),
        left_B=put(state.left_B, jnp.full(n, max_tokens - 1, jnp.int32)),
        done_B=put(state.done_B, (token == requests.eot) | (max_tokens <= 1)),
        keys_B=put(state.keys_B, requests.keys_B),
        seen_BxV=put(state.seen_BxV, seen),
        cache=_insert(state.cache, cache, rows_n, positions),
        out_BxC=state.out_BxC.at[rows_n, 0].set(token, mode="drop"),
        logprobs_BxC=state.logprobs_BxC.at[rows_n, 0].set(logprob, mode="drop"),
        count=jnp.ones((), jnp.int32),
    )


def _insert(cache: Cache, new: Cache, rows_n: Array, positions_nxT: Array) -> Cache:
    """Lays rows of a cache of T tokens into the slots before the present one of another; the rest is emptied."""
    B, (n, T) = cache.positions_BxS.shape[0], positions_nxT.shape

    def slots_of(S: int) -> Array:
        kept = min(T, S)
        return (cache.index - kept + jnp.arange(kept)) % S

    def positions(old_BxS: Array) -> Array:
        at = slots_of(old_BxS.shape[1])
        fresh = jnp.full((n, old_BxS.shape[1]), -1, jnp.int32).at[:, at].set(positions_nxT[:, T - len(at) :])
        return old_BxS.at[rows_n].set(fresh, mode="drop")

    def heads(old_NxSxK: Array, new_NxTxK: Array) -> Array:
        N, S, K = old_NxSxK.shape
        G, at = N // B, slots_of(S)
        fresh = new_NxTxK.reshape(n, G, T, K)[:, :, T - len(at) :]
        index = (rows_n[:, None, None], jnp.arange(G)[None, :, None], at[None, None, :])
        return old_NxSxK.reshape(B, G, S, K).at[index].set(fresh, mode="drop").reshape(N, S, K)

    return cache.replace(
        k_NxSxK=tuple(map(heads, cache.k_NxSxK, new.k_NxSxK)),
        v_NxSxK=tuple(map(heads, cache.v_NxSxK, new.v_NxSxK)),
        positions_BxS=positions(cache.positions_BxS),
        ring_BxR=None if cache.ring_BxR is None else positions(cache.ring_BxR),
    )


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def _run(model: Transformer, params: Any, state: Rows, filters: Filters, eot: Array, waiting: Array) -> Rows:
    """Draws up to _CHUNK tokens of every row; fewer if all have ended, or one has and another prompt is waiting."""
    before = state.done_B

    def more(state: Rows) -> Array:
        replaceable = waiting & jnp.any(state.done_B & ~before)
        return (state.count < _CHUNK) & ~jnp.all(state.done_B) & ~replaceable

    def step(state: Rows) -> Rows:
        hidden, cache = model.apply(
            {"params": params},
            state.token_B[:, None],
            positions=state.position_B[:, None],
            cache=state.cache,
            method="encode",
        )
        at = state.position_B + 1
        token, logprob, seen = _draw(model, params, hidden[:, -1], filters, state.keys_B, at, state.seen_BxV)
        token = jnp.where(state.done_B, jnp.maximum(eot, 0), token)
        left = state.left_B - 1
        return state.replace(
            token_B=token,
            position_B=at,
            left_B=left,
            done_B=state.done_B | (token == eot) | (left <= 0),
            seen_BxV=seen,
            cache=cache,
            out_BxC=lax.dynamic_update_slice(state.out_BxC, token[:, None], (0, state.count)),
            logprobs_BxC=lax.dynamic_update_slice(state.logprobs_BxC, logprob[:, None], (0, state.count)),
            count=state.count + 1,
        )

    return lax.while_loop(more, step, state)


def _draw(
    model: Transformer, params: Any, hidden_BxD: Array, filters: Filters, keys_B: Array, at_B: Array, seen_BxV: Array
) -> tuple[Array, Array, Array]:
    """Returns (token for position `at`, its log-probability under the model, `seen` with it), each [B, ...]."""
    logits = model.apply({"params": params}, hidden_BxD, method="unembed")[:, : model.config.vocab_size]
    drawn_from, rows = logits, jnp.arange(logits.shape[0])
    if filters.repetition_penalty is not None:
        drawn_from = penalise(logits, seen_BxV, filters.repetition_penalty)
    token = sample_token(drawn_from, jax.vmap(jax.random.fold_in)(keys_B, at_B), filters)
    if filters.repetition_penalty is not None:
        seen_BxV = seen_BxV.at[rows, token].set(True)
    return token, jax.nn.log_softmax(logits)[rows, token], seen_BxV
