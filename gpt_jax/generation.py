"""Generation: one jitted loop over a static key/value cache (GPT-2's 'past').

Ragged prompts are padded on the left, so that all rows write the same slot of the cache; padding has position -1 and is
seen by no query. A request draws under its own key, folded with the index of the token: its result does not depend on
the batch it is in.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from gpt_jax.errors import UserError
from gpt_jax.model import Cache, Transformer
from gpt_jax.model.attention import HIDDEN


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: 0 is greedy. top_k: keep the k most likely, 0 is off. top_p: keep the smallest set of tokens with at
        least this probability (the token that crosses it is kept). min_p: drop tokens less likely than min_p times the
        most likely one. repetition_penalty: theta of CTRL (Keskar et al. 2019): logits of tokens already there are
        divided by it if positive, else multiplied.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 <= self.top_p <= 1, "between 0 and 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not ok:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {allowed}.")


def penalise(logits_BxV: Array, seen_BxV: Array, penalty: float) -> Array:
    """Repetition penalty on tokens already seen."""
    if penalty == 1.0:
        return logits_BxV
    return jnp.where(seen_BxV, jnp.where(logits_BxV > 0, logits_BxV / penalty, logits_BxV * penalty), logits_BxV)


def filter_logits(logits_BxV: Array, sampling: Sampling) -> Array:
    """Applies temperature, then top-k, top-p and min-p: what is cut gets about -1e30. [B, V] float32."""
    logits = logits_BxV / sampling.temperature
    V = logits.shape[-1]
    if 0 < sampling.top_k < V:
        kth = lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, HIDDEN)
    if sampling.top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p  # probability of the tokens ahead of this one
        kept = (before < sampling.top_p).at[:, 0].set(True)
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, HIDDEN)
    if sampling.min_p > 0.0:
        p = jax.nn.softmax(logits, axis=-1)
        logits = jnp.where(p >= sampling.min_p * jnp.max(p, axis=-1, keepdims=True), logits, HIDDEN)
    return logits


def sample_token(logits_BxV: Array, keys_B: Array, sampling: Sampling) -> Array:
    """Draws a token per row under its key; [B] int32."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits = filter_logits(logits_BxV, sampling)
    return jax.vmap(jax.random.categorical)(keys_B, logits).astype(jnp.int32)


@struct.dataclass
class _State:
    """The loop: tokens written so far, the cache, the logits of the next token."""

    out_BxN: Array
    count: Array
    logits_BxV: Array
    cache: Cache
    seen_BxV: Array
    done_B: Array
    logprobs_BxN: Array


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _prefill(model: Transformer, params: Any, prompt: tuple[Array, Array], slots: int, max_tokens: int) -> _State:
    tokens_BxT, lengths_B = prompt
    B, T = tokens_BxT.shape
    positions = jnp.arange(T) - (T - lengths_B)[:, None]
    positions = jnp.where(positions >= 0, positions, -1)
    cache = Cache.empty(model.config, B, slots)
    hidden, cache = model.apply({"params": params}, tokens_BxT, positions=positions, cache=cache, method="encode")
    logits = model.apply({"params": params}, hidden[:, -1], method="unembed")[:, : model.config.vocab_size]
    V = model.config.vocab_size
    seen = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], tokens_BxT].max(positions >= 0)
    zeros = jnp.zeros((B, max_tokens), jnp.int32)
    return _State(zeros, jnp.zeros((), jnp.int32), logits, cache, seen, jnp.zeros(B, bool), zeros.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=(2,))
def _decode(
    model: Transformer, params: Any, state: _State, keys_B: Array, sampling: Sampling, eot: int, until: Array
) -> _State:
    """Draws tokens until `until` of them are there or every row has ended."""
    rows = jnp.arange(keys_B.shape[0])

    def more(state: _State) -> Array:
        return (state.count < until) & ~jnp.all(state.done_B)

    def draw(state: _State) -> _State:
        logits = penalise(state.logits_BxV, state.seen_BxV, sampling.repetition_penalty)
        keys = jax.vmap(lambda key: jax.random.fold_in(key, state.count))(keys_B)
        token = sample_token(logits, keys, sampling)
        token = jnp.where(state.done_B, max(eot, 0), token)  # a finished row stays as it is
        logprob = jax.nn.log_softmax(state.logits_BxV)[rows, token]
        last = jnp.max(state.cache.positions_BxS, axis=1, keepdims=True)
        hidden, cache = model.apply(
            {"params": params}, token[:, None], positions=last + 1, cache=state.cache, method="encode"
        )
        new = model.apply({"params": params}, hidden[:, -1], method="unembed")[:, : model.config.vocab_size]
        return _State(
            out_BxN=lax.dynamic_update_slice(state.out_BxN, token[:, None], (0, state.count)),
            count=state.count + 1,
            logits_BxV=new,
            cache=cache,
            seen_BxV=state.seen_BxV.at[rows, token].set(True),
            done_B=state.done_B | (token == eot),
            logprobs_BxN=lax.dynamic_update_slice(state.logprobs_BxN, logprob[:, None], (0, state.count)),
        )

    return lax.while_loop(more, draw, state)


def _bucket(n: int) -> int:
    """Rounds lengths up, so that few programs are compiled: powers of two from 16."""
    return max(16, 1 << (n - 1).bit_length())


def _check(model: Transformer, prompts: Sequence[Sequence[int]], max_tokens: int, eot: int | None) -> list[list[int]]:
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


def request_keys(seeds: Sequence[int]) -> Array:
    """One key per request."""
    return jnp.stack([jax.random.key(seed, impl="threefry2x32") for seed in seeds])


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
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Generates in chunks, as tokens come.

    Args:
      chunk: tokens per chunk; 0 is all at once. The rest: see `generate`.

    Yields:
      (tokens [B, n], log-probabilities [B, n], finished [B]) of each chunk.
    """
    ids = _check(model, prompts, max_tokens, eot)
    sampling = sampling or Sampling()
    B, T = len(ids), _bucket(max(map(len, ids)))
    N = _bucket(max_tokens)
    tokens = np.zeros((B, T), np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[T - len(prompt) :] = prompt
    lengths = np.asarray([len(prompt) for prompt in ids], np.int32)
    keys = request_keys(list(seeds) if seeds is not None else list(range(B)))
    # Slots beyond the model's positions hold left padding, or tokens past max_tokens that are never asked for.
    state = _prefill(model, params, (tokens, lengths), T + N, N)
    done = 0
    while done < max_tokens:
        until = min(max_tokens, done + (chunk or max_tokens))
        state = _decode(model, params, state, keys, sampling, -1 if eot is None else eot, until)
        count = int(state.count)
        finished = np.asarray(state.done_B)
        yield np.asarray(state.out_BxN[:, done:count]), np.asarray(state.logprobs_BxN[:, done:count]), finished
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

    Returns:
      The new ids of each prompt, and with `logprobs` their log-probabilities.

    Raises:
      UserError: a prompt that does not fit the model's positions, an id outside the vocabulary, a setting out of range.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    parts = stream_batch(model, params, prompts, max_tokens=max_tokens, sampling=sampling, eot=eot, seeds=seeds)
    tokens, scores, _ = next(parts)
    ids, values = [], []
    for row, row_scores in zip(tokens.tolist(), scores.tolist(), strict=True):
        end = row.index(eot) if eot in row else len(row)
        ids.append(row[:end])
        values.append(row_scores[:end])
    return (ids, values) if logprobs else ids


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
