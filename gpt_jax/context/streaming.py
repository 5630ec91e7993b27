"""Streams without end in a cache of fixed size: attention sinks (Xiao et al. 2024).

The first tokens stay in the cache and the rest is a ring of the newest ones. Positions are those within the cache, so
none grows beyond its size: keys are kept as they are before rotation, and rotated where they stand when they are read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from gpt_jax.errors import UserError
from gpt_jax.model import ModelConfig, Transformer
from gpt_jax.model.decoding import decoding_params
from gpt_jax.model.positions import rotate
from gpt_jax.sampling import Filters, Sampling, penalise, sample_token

SINKS = 4


@struct.dataclass
class SinkCache:
    """A `Cache` of S slots, `sinks` of them for the first tokens of every row; one token is entered at a time.

    Attributes:
      config: of the model. sinks: tokens that stay.
      k_NxSxK, v_NxSxK: of each layer, N = rows x heads, keys not rotated.
      count: tokens entered so far, the same for every row. rows: of the batch.
    """

    config: ModelConfig = struct.field(pytree_node=False)
    sinks: int = struct.field(pytree_node=False)
    rows: int = struct.field(pytree_node=False)
    k_NxSxK: tuple[Array, ...]
    v_NxSxK: tuple[Array, ...]
    count: Array

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, size: int, sinks: int = SINKS) -> SinkCache:
        """A cache without tokens; raises UserError if learned positions or the sinks leave no room to roll."""
        if config.positions == "learned":
            raise UserError(
                f"a model with {config.max_positions} learned positions cannot stream beyond them: it takes rope, "
                "alibi or none."
            )
        if not 0 <= sinks < size:
            raise UserError(f"sinks is {sinks}; it must be 0 or more and less than the cache's size, {size}.")
        shape = (rows * config.kv_heads, size, config.key_size)
        k, v = (tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers)) for _ in "kv")
        return cls(config, sinks, rows, k, v, jnp.zeros((), jnp.int32))

    @property
    def size(self) -> int:
        return self.k_NxSxK[0].shape[1]

    @property
    def position(self) -> Array:
        """Position within the cache of the token that comes next."""
        return jnp.minimum(self.count, self.size - 1)

    @property
    def _slot(self) -> Array:
        ring = self.sinks + (self.count - self.sinks) % (self.size - self.sinks)
        return jnp.where(self.count < self.size, self.count, ring)

    @property
    def _positions_S(self) -> Array:
        """Positions of the slots when the next token is entered: -1 for those that hold none."""
        slot, ring = jnp.arange(self.size), self.size - self.sinks
        age = (self.count - slot) % ring  # of what a slot of the ring holds, with slot = token (mod ring)
        rolled = jnp.where(slot < self.sinks, slot, self.size - 1 - age)
        growing = jnp.where(slot <= self.count, slot, -1)
        return jnp.where(self.count < self.size, growing, rolled)

    @property
    def positions_BxS(self) -> Array:
        return jnp.broadcast_to(self._positions_S, (self.rows, self.size))

    def positions(self, layer: int) -> Array:
        return self.positions_BxS

    def extend(self, positions_BxT: Array) -> SinkCache:
        if positions_BxT.shape[1] != 1:
            raise ValueError(f"{positions_BxT.shape[1]} tokens at once; a stream takes one")
        return self

    def write(self, layer: int, k_BxTxGxK: Array, v_BxTxGxK: Array) -> SinkCache:
        if self.config.positions == "rope":
            k_BxTxGxK = self._rotate(k_BxTxGxK, -self.position[None])

        def put(layers: tuple[Array, ...], new_BxTxGxK: Array) -> tuple[Array, ...]:
            new_NxTxK = jnp.swapaxes(new_BxTxGxK, 1, 2).reshape(-1, 1, new_BxTxGxK.shape[3])
            updated = lax.dynamic_update_slice(layers[layer], new_NxTxK, (0, self._slot, 0))
            return (*layers[:layer], updated, *layers[layer + 1 :])

        return self.replace(k_NxSxK=put(self.k_NxSxK, k_BxTxGxK), v_NxSxK=put(self.v_NxSxK, v_BxTxGxK))

    def read(self, layer: int) -> tuple[Array, Array]:
        k_NxSxK = self.k_NxSxK[layer]
        if self.config.positions == "rope":
            k_NxSxK = self._rotate(k_NxSxK[:, :, None], self._positions_S)[:, :, 0]
        return k_NxSxK, self.v_NxSxK[layer]

    def advance(self, tokens: int) -> SinkCache:
        return self.replace(count=self.count + tokens)

    def _rotate(self, x: Array, positions: Array) -> Array:
        return rotate(x, positions, self.config.rope_base, self.config.rope)


def _step(model: Transformer, params: Any, cache: SinkCache, token_B: Array) -> tuple[SinkCache, Array]:
    """Enters a token per row; returns the logits of the next, [B, V]."""
    positions = jnp.broadcast_to(cache.position, (cache.rows, 1))
    hidden, cache = model.apply({"params": params}, token_B[:, None], positions=positions, cache=cache, method="encode")
    logits = model.apply({"params": params}, hidden[:, -1], method="unembed")
    return cache, logits[:, : model.config.vocab_size]


@functools.partial(jax.jit, static_argnums=0)
def _score(model: Transformer, params: Any, cache: SinkCache, tokens_TxB: Array, targets_TxB: Array) -> Array:
    def one(cache: SinkCache, pair: tuple[Array, Array]) -> tuple[SinkCache, Array]:
        token_B, target_B = pair
        cache, logits = _step(model, params, cache, token_B)
        picked = jnp.take_along_axis(logits, target_B[:, None], axis=-1)[:, 0]
        return cache, jax.nn.logsumexp(logits, axis=-1) - picked

    return lax.scan(one, cache, (tokens_TxB, targets_TxB))[1]


def streamed_losses(
    model: Transformer, params: Any, rows_BxT1: np.ndarray, *, size: int, sinks: int = SINKS
) -> np.ndarray:
    """Loss of each token of rows of T + 1 as a stream sees them, nats [B, T].

    Args:
      size: slots of the cache, the sinks among them. sinks: 0 is a window alone.
    """
    rows = np.asarray(rows_BxT1, np.int32)
    cache = SinkCache.empty(model.config, rows.shape[0], size, sinks)
    params = decoding_params(model.config, params, rows.shape[0])
    return np.asarray(_score(model, params, cache, rows[:, :-1].T, rows[:, 1:].T)).T


@functools.partial(jax.jit, static_argnums=0)
def _enter(model: Transformer, params: Any, cache: SinkCache, tokens_TxB: Array) -> SinkCache:
    return lax.scan(lambda c, token: (_step(model, params, c, token)[0], None), cache, tokens_TxB)[0]


_Carry = tuple[SinkCache, Array, Array]  # and the last token [B], and which tokens are there already, bool [B, V]


@functools.partial(jax.jit, static_argnums=(0, 5))
def _draw(
    model: Transformer, params: Any, carry: _Carry, key: Array, filters: Filters, count: int
) -> tuple[_Carry, Array]:
    def one(carry: _Carry, _: None) -> tuple[_Carry, Array]:
        cache, token_B, seen_BxV = carry
        cache, logits = _step(model, params, cache, token_B)
        if filters.repetition_penalty is not None:
            logits = penalise(logits, seen_BxV, filters.repetition_penalty)
        token_B = sample_token(logits, jax.random.fold_in(key, cache.count)[None], filters)
        return (cache, token_B, seen_BxV.at[jnp.arange(cache.rows), token_B].set(True)), token_B

    carry, tokens_NxB = lax.scan(one, carry, None, length=count)
    return carry, tokens_NxB[:, 0]


def stream(
    model: Transformer,
    params: Any,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    size: int,
    sinks: int = SINKS,
    sampling: Sampling | None = None,
    eot: int | None = None,
    seed: int = 0,
    chunk: int = 16,
) -> Iterator[list[int]]:
    """Continues a prompt for as long as asked, whatever the context: memory and time per token stay the same.

    Args:
      prompt: ids, at least one; it may be longer than the cache. size: slots of the cache, the sinks among them.
      sampling: None draws at temperature 1; a repetition penalty is on all tokens so far.
      eot: ends the stream (it is not yielded). seed: of the draws.
      chunk: tokens yielded at a time.

    Yields:
      Lists of new ids.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, learned positions, no room beside the sinks.
    """
    ids = [int(i) for i in prompt]
    if not ids or max_tokens < 1 or chunk < 1:
        raise UserError(
            f"a stream needs a prompt, max_tokens and chunk of at least 1, not {len(ids)}, {max_tokens}, {chunk}."
        )
    if bad := [i for i in ids if not 0 <= i < model.config.vocab_size]:
        raise UserError(f"token {bad[0]} is not in the model's vocabulary of {model.config.vocab_size}.")
    cache = SinkCache.empty(model.config, 1, size, sinks)
    params = decoding_params(model.config, params, 1)
    key = jax.random.key(seed, impl="threefry2x32")
    filters = (sampling or Sampling()).filters()
    if len(ids) > 1:
        cache = _enter(model, params, cache, np.asarray(ids[:-1], np.int32)[:, None])
    seen = jnp.zeros((1, model.config.vocab_size), bool).at[0, np.asarray(ids)].set(True)
    carry, done = (cache, jnp.asarray(ids[-1:], jnp.int32), seen), 0
    while done < max_tokens:
        carry, new = _draw(model, params, carry, key, filters, chunk)
        out = np.asarray(new).tolist()[: max_tokens - done]
        done += len(out)
        if eot in out:
            yield out[: out.index(eot)]
            return
        yield out
