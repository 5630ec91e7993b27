"""Generation: one jitted loop over a static key/value cache (GPT-2's 'past').

Ragged prompts are padded on the left, so that all rows write the same slot of the cache; padding has position -1 and is
seen by no query. A request draws under its own key, folded with the position of the token: up to rounding of the logits
its result does not depend on the batch it is in.

Rows, prompt lengths and numbers of new tokens are rounded up, and the sampler's settings are arguments of the compiled
functions: few programs serve all requests.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from gpt_jax.errors import UserError
from gpt_jax.model import Cache, Mask, Transformer
from gpt_jax.model.cache import ring_slots
from gpt_jax.model.decoding import decoding_params
from gpt_jax.sampling import Filters, Sampling, filter_logits, penalise, sample_token

__all__ = ["Sampling", "filter_logits", "generate", "generate_text", "penalise", "sample_token", "stream_batch"]

MAX_ROWS = 32  # prompts generated together: bounds the memory of the cache
_SEARCHED = 64  # rows of the cache of one search: prompts x its width
_PREFILL = 256  # prompt tokens that go through the model at once: bounds the memory of attention scores


@struct.dataclass
class Requests:
    """What does not change while a batch is generated.

    Attributes:
      tokens_BxT, lengths_B: prompts, padded on the left, and their lengths. keys_B: one key per request.
      filters: of the sampler. eot: the id that ends a text, -1 for none.
    """

    tokens_BxT: Array
    lengths_B: Array
    keys_B: Array
    filters: Filters
    eot: Array


@struct.dataclass
class State:
    """The loop's state after `count` new tokens.

    Attributes:
      out_BxN, logprobs_BxN: the new tokens and, if asked for, their log-probabilities ([B, 0] if not).
      cache: of all tokens but the last. done_B: rows that have ended. seen_BxV: tokens that are there, for the
      repetition penalty ([B, 0] without).
    """

    out_BxN: Array
    logprobs_BxN: Array
    count: Array
    cache: Cache
    done_B: Array
    seen_BxV: Array


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _prefill(
    model: Transformer, params: Any, requests: Requests, size: int, logprobs: bool, bidirectional: bool
) -> State:
    """Runs the prompts and draws the first token of each; `size` is the most tokens that there may be."""
    B, T = requests.tokens_BxT.shape
    V = model.config.vocab_size
    positions_BxT = positions_of(requests.lengths_B, T)
    seen = jnp.zeros((B, 0), bool)
    if requests.filters.repetition_penalty is not None:
        rows = jnp.arange(B)[:, None]
        seen = jnp.zeros((B, V), bool).at[rows, requests.tokens_BxT].max(positions_BxT >= 0)
    last = prefill_piece(T) if not bidirectional else T
    state = State(
        out_BxN=jnp.zeros((B, size), jnp.int32),
        logprobs_BxN=jnp.zeros((B, size if logprobs else 0), jnp.float32),
        count=jnp.zeros((), jnp.int32),
        cache=Cache.empty(model.config, B, T + size, ring_slots(model.config, last)),
        done_B=requests.lengths_B == 0,
        seen_BxV=seen,
    )
    state = state.replace(cache=enter_pieces(model, params, requests.tokens_BxT, positions_BxT, state.cache, last))
    mask = Mask("bidirectional") if bidirectional else None
    return _step(model, params, requests, state, requests.tokens_BxT[:, -last:], positions_BxT[:, -last:], mask)


def enter_pieces(
    model: Transformer, params: Any, tokens_BxT: Array, positions_BxT: Array, cache: Cache, piece: int
) -> Cache:
    """Enters all but the last piece of prompts into a cache, `piece` tokens at a time."""
    B, T = tokens_BxT.shape
    if T <= piece:
        return cache
    pieces = [jnp.moveaxis(x.reshape(B, T // piece, piece), 1, 0)[:-1] for x in (tokens_BxT, positions_BxT)]

    def run(cache: Cache, xs: tuple[Array, Array]) -> tuple[Cache, None]:
        tokens, at = xs
        return model.apply({"params": params}, tokens, positions=at, cache=cache, method="encode")[1], None

    return lax.scan(run, cache, tuple(pieces))[0]


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(3,))
def _decode(model: Transformer, params: Any, requests: Requests, state: State, until: Array) -> State:
    """Draws tokens until `until` of them are there or every row has ended."""

    def more(state: State) -> Array:
        return (state.count < until) & ~jnp.all(state.done_B)

    def step(state: State) -> State:
        token = lax.dynamic_slice_in_dim(state.out_BxN, state.count - 1, 1, axis=1)
        position = requests.lengths_B + state.count - 1
        return _step(model, params, requests, state, token, position[:, None])

    return lax.while_loop(more, step, state)


def _step(
    model: Transformer,
    params: Any,
    requests: Requests,
    state: State,
    tokens_BxT: Array,
    positions_BxT: Array,
    mask: Mask | None = None,
) -> State:
    """Enters tokens into the cache and draws the next one; rows that have ended get `eot` and stay as they are."""
    hidden, cache = model.apply(
        {"params": params}, tokens_BxT, mask=mask, positions=positions_BxT, cache=state.cache, method="encode"
    )
    logits = model.apply({"params": params}, hidden[:, -1], method="unembed")[:, : model.config.vocab_size]
    drawn_from, rows = logits, jnp.arange(logits.shape[0])
    if requests.filters.repetition_penalty is not None:
        drawn_from = penalise(logits, state.seen_BxV, requests.filters.repetition_penalty)
    keys = jax.vmap(jax.random.fold_in)(requests.keys_B, requests.lengths_B + state.count)
    token = sample_token(drawn_from, keys, requests.filters)
    token = jnp.where(state.done_B, jnp.maximum(requests.eot, 0), token)
    state = state.replace(
        out_BxN=lax.dynamic_update_slice(state.out_BxN, token[:, None], (0, state.count)),
        count=state.count + 1,
        cache=cache,
        done_B=state.done_B | (token == requests.eot),
    )
    if requests.filters.repetition_penalty is not None:
        state = state.replace(seen_BxV=state.seen_BxV.at[rows, token].set(True))
    if state.logprobs_BxN.shape[1]:
        logprob = jax.nn.log_softmax(logits)[rows, token]
        at = (0, state.count - 1)
        state = state.replace(logprobs_BxN=lax.dynamic_update_slice(state.logprobs_BxN, logprob[:, None], at))
    return state


def bucket(n: int, least: int = 1) -> int:
    """Rounds up to 2^i or 3 * 2^i, at least `least`: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ..."""
    n = max(n, least)
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


def slots_for(tokens: int) -> int:
    """Slots of a cache for so many new tokens: a multiple of 16 that is at most an eighth more where they are many.

    Every step reads all slots, so they are rounded up less than what only costs once.
    """
    step = max(16, (1 << max(tokens - 1, 1).bit_length()) // 16)
    return -(-tokens // step) * step


def prefill_piece(T: int) -> int:
    """Tokens of a prompt of T = bucket(n) tokens that go through the model at once: T or a divisor of it."""
    return T if T <= _PREFILL else _PREFILL if T % _PREFILL == 0 else _PREFILL // 2


def check_prompts(
    model: Transformer, prompts: Sequence[Sequence[int]], max_tokens: int, eot: int | None
) -> list[list[int]]:
    """Returns the prompts as lists, an empty one as [eot]; raises UserError for what the model cannot continue."""
    config = model.config
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; it must be at least 1.")
    out = []
    for prompt in prompts:
        ids = [int(i) for i in prompt]
        if not ids:
            if eot is None:
                raise UserError("a prompt is empty, and the tokenizer has no 'eot' to begin with.")
            ids = [eot]
        if bad := [i for i in ids if not 0 <= i < config.vocab_size]:
            raise UserError(f"token {bad[0]} is not in the model's vocabulary of {config.vocab_size}.")
        if config.positions == "learned" and len(ids) + max_tokens > config.max_positions:
            raise UserError(
                f"a prompt of {len(ids)} tokens and max_tokens={max_tokens} do not fit the model's "
                f"{config.max_positions} learned positions."
            )
        out.append(ids)
    return out


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as (tokens [B, T], lengths [B]), both rounded up: the last token of each in the last place."""
    B, T = bucket(len(prompts)), bucket(max(map(len, prompts)), least=16)
    tokens, lengths = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, T - len(prompt) :], lengths[row] = prompt, len(prompt)
    return tokens, lengths


def positions_of(lengths_B: Array, T: int) -> Array:
    """The position of each token of prompts padded on the left, [B, T]; -1 is padding."""
    positions = jnp.arange(T) - (T - lengths_B)[:, None]
    return jnp.where(positions >= 0, positions, -1)


def make_requests(
    prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, eot: int | None
) -> Requests:
    """Lays prompts out as a batch: rows beyond them, up to a round number, have length 0 and have ended already."""
    tokens, lengths = pad_left(prompts)
    numbers = np.zeros(len(lengths), np.uint32)
    numbers[: len(prompts)] = [seed & 0xFFFFFFFF for seed in seeds]
    keys = jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))(numbers)
    return Requests(tokens, lengths, keys, sampling.filters(), np.int32(-1 if eot is None else eot))


def stream_batch(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    eot: int | None = None,
    seeds: Sequence[int] | None = None,
    chunk: int = 0,
    logprobs: bool = False,
    bidirectional_prompt: bool = False,
) -> Generator[tuple[np.ndarray, np.ndarray, np.ndarray], Sequence[bool] | None, None]:
    """Generates one batch in chunks, as tokens come.

    Args:
      chunk: tokens per chunk; 0 is all at once. The rest: see `generate`.

    Yields:
      (tokens [B, n], log-probabilities [B, n] or [B, 0], finished [B]) of each chunk. What is sent back, if anything,
      names the rows that are to end here, [B] booleans: a stop string was found.
    """
    ids, B = check_prompts(model, prompts, max_tokens, eot), len(prompts)
    if not ids:
        return
    requests = make_requests(ids, list(seeds) if seeds is not None else range(B), sampling or Sampling(), eot)
    params = decoding_params(model.config, params, requests.tokens_BxT.shape[0])
    # Slots beyond the model's positions hold left padding, or tokens past max_tokens that are never asked for.
    state = _prefill(model, params, requests, slots_for(max_tokens), logprobs, bidirectional_prompt)
    done = 0
    while done < max_tokens:
        state = _decode(model, params, requests, state, min(max_tokens, done + (chunk or max_tokens)))
        count = int(state.count)
        new, scores = np.asarray(state.out_BxN[:B, done:count]), np.asarray(state.logprobs_BxN[:B, done:count])
        finished = np.array(state.done_B)
        ended = yield new, scores, finished[:B]
        if ended is not None:
            finished[:B] |= np.asarray(ended, bool)
            state = state.replace(done_B=finished)
        done = count
        if finished.all():
            return


def generate(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eot: int | None = None,
    seeds: Sequence[int] | None = None,
    logprobs: bool = False,
    bidirectional_prompt: bool = False,
) -> list[list[int]] | tuple[list[list[int]], list[list[float]]]:
    """Continues each prompt.

    Args:
      model, params: the parameters of the model's own root.
      prompts: token ids; an empty one begins with `eot`.
      max_tokens: tokens generated per prompt at most.
      temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`; temperature 0 is greedy.
      eot: the id that ends a text (it is not returned); None never ends early.
      seeds: one per prompt; the same prompt under the same seed gives the same tokens in any batch. None: 0, 1, 2, ...
      logprobs: also return the log-probability of each token under the model, nats.
      bidirectional_prompt: tokens of a prompt see each other, as in training under a prefix mask.

    Returns:
      The new ids of each prompt, and with `logprobs` their log-probabilities.

    Raises:
      UserError: a prompt that does not fit the model's positions, an id outside the vocabulary, a setting out of range.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    prompts = check_prompts(model, prompts, max_tokens, eot)
    seeds = list(seeds) if seeds is not None else list(range(len(prompts)))
    if len(seeds) != len(prompts):
        raise UserError(f"there are {len(seeds)} seeds for {len(prompts)} prompts.")
    ids: list[list[int]] = [[] for _ in prompts]
    values: list[list[float]] = [[] for _ in prompts]
    for rows in batches_by_length(prompts):
        parts = stream_batch(
            model,
            params,
            [prompts[row] for row in rows],
            max_tokens=max_tokens,
            sampling=sampling,
            eot=eot,
            seeds=[seeds[row] for row in rows],
            logprobs=logprobs,
            bidirectional_prompt=bidirectional_prompt,
        )
        tokens, scores, _ = next(parts)
        for row, new, new_scores in zip(rows, tokens.tolist(), scores.tolist(), strict=True):
            end = new.index(eot) if eot in new else len(new)
            ids[row], values[row] = new[:end], new_scores[:end]
    return (ids, values) if logprobs else ids


def batches_by_length(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Cuts prompts into batches of at most MAX_ROWS of like length; returns the indices in each."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    return [order[i : i + MAX_ROWS] for i in range(0, len(order), MAX_ROWS)]


def batches_for_search(
    prompts: Sequence[Sequence[int]], width: int
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yields (indices, tokens [B, T], lengths [B]) of prompts of like length that are searched together.

    Args:
      width: rows of the cache that a search keeps for each prompt.
    """
    most = max(1, _SEARCHED // width)
    for group in batches_by_length(prompts):
        for start in range(0, len(group), most):
            rows = group[start : start + most]
            yield rows, *pad_left([prompts[row] for row in rows])


def generate_text(
    model: Transformer, params: Any, tokenizer: Any, prompts: Sequence[str], *, seed: int = 0, **settings: Any
) -> list[str]:
    """Continues texts; settings as in `generate`. Prompts begin with EOT where the tokenizer has one, as documents do.

    Prompts and max_tokens are cut to what fits learned positions: for samples during training.
    """
    eot = tokenizer.eot
    begin = [] if eot is None else [eot]
    ids = [begin + tokenizer.encode(prompt).tolist() for prompt in prompts]
    if model.config.positions == "learned":
        room = model.config.max_positions
        settings["max_tokens"] = max(1, min(settings["max_tokens"], room // 2))
        ids = [prompt[-(room - settings["max_tokens"]) :] for prompt in ids]
    new = generate(model, params, ids, eot=eot, seeds=[seed + i for i in range(len(ids))], **settings)
    return [tokenizer.decode(row) for row in new]
