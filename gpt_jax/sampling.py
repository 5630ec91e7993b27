"""The sampler: pure functions from the logits of the next token to a token.

Nothing is sorted and one pair of uniform numbers is drawn per token, not one number per entry of the vocabulary: for a
large vocabulary either would take longer than the model's own step.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from gpt_jax.errors import UserError
from gpt_jax.model.attention import HIDDEN

BLOCK = 128  # tokens of the vocabulary summed together when drawing
_SMALL = 1024  # vocabularies up to this are sorted: cheaper than a loop over the bits of a threshold
_COLDEST = float(jnp.finfo(jnp.float32).tiny)  # a lower temperature is 0 on a device
_ROUNDING = 1e-6  # a set whose probability misses top_p by this much has it


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
        if self.temperature < _COLDEST:
            object.__setattr__(self, "temperature", 0.0)

    def filters(self) -> Filters:
        """The same as arguments of a compiled function, which depends on what is on but not on the numbers."""
        greedy = self.temperature == 0

        def value(number: float, off: float) -> Array | None:
            return None if greedy or number == off else jnp.asarray(number, jnp.float32)

        return Filters(
            temperature=value(self.temperature, 0.0),
            top_k=0 if greedy else self.top_k,
            top_p=value(self.top_p, 1.0),
            min_p=value(self.min_p, 0.0),
            repetition_penalty=None
            if self.repetition_penalty == 1
            else jnp.asarray(self.repetition_penalty, jnp.float32),
        )


@struct.dataclass
class Filters:
    """`Sampling` in a compiled function: float32 scalars or [B, 1]; None is off, and greedy for the temperature."""

    temperature: Array | None = None
    top_p: Array | None = None
    min_p: Array | None = None
    repetition_penalty: Array | None = None
    top_k: int = struct.field(pytree_node=False, default=0)


def _filters(sampling: Sampling | Filters) -> Filters:
    return sampling.filters() if isinstance(sampling, Sampling) else sampling


def penalise(logits_BxV: Array, seen_BxV: Array, penalty: float | Array) -> Array:
    """Repetition penalty on tokens already seen."""
    return jnp.where(seen_BxV, jnp.where(logits_BxV > 0, logits_BxV / penalty, logits_BxV * penalty), logits_BxV)


def filter_logits(logits_BxV: Array, sampling: Sampling | Filters) -> Array:
    """Applies temperature, then top-k, top-p and min-p: what is cut gets -1e30. Ties with the last one kept are kept.

    Args:
      logits_BxV: float32. sampling: what to apply; temperature 0 is `sample_token`'s matter and is left out here.
    """
    filters = _filters(sampling)
    logits = logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True)  # so that no temperature, however low, overflows
    if filters.temperature is not None:
        logits = logits / filters.temperature
    if 0 < filters.top_k < logits.shape[-1]:
        kth = lax.top_k(logits, filters.top_k)[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, HIDDEN)
    if filters.top_p is not None:
        p = _unnormalised(logits)
        mass = filters.top_p * jnp.sum(p, axis=-1, keepdims=True) * (1 - _ROUNDING)
        logits = jnp.where(p >= _nucleus(p, jnp.broadcast_to(mass, (p.shape[0], 1))), logits, HIDDEN)
    if filters.min_p is not None:
        logits = jnp.where(_unnormalised(logits) >= filters.min_p, logits, HIDDEN)
    return logits


def _unnormalised(logits_BxV: Array) -> Array:
    """Probabilities over that of the most likely token."""
    return jnp.exp(logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True))


def _nucleus(p_BxV: Array, mass_Bx1: Array) -> Array:
    """The largest threshold, at most max(p), at and above which entries of p sum to `mass`; [B, 1]."""
    if p_BxV.shape[-1] <= _SMALL:
        ordered = jnp.sort(p_BxV, axis=-1, descending=True)
        ahead = jnp.cumsum(ordered, axis=-1) - ordered
        return jnp.min(jnp.where(ahead < mass_Bx1, ordered, ordered[:, :1]), axis=-1, keepdims=True)

    # Floats that are not negative are ordered as their bits: the threshold is built from its highest bit down.
    bits_BxV = lax.bitcast_convert_type(p_BxV, jnp.int32)

    def add_bit(i: Array, threshold: Array) -> Array:
        higher = threshold | (1 << (29 - i))
        enough = jnp.sum(jnp.where(bits_BxV >= higher, p_BxV, 0.0), axis=-1, keepdims=True) >= mass_Bx1
        return jnp.where(enough, higher, threshold)

    threshold = lax.fori_loop(0, 30, add_bit, jnp.zeros(mass_Bx1.shape, jnp.int32))
    return jnp.minimum(lax.bitcast_convert_type(threshold, jnp.float32), jnp.max(p_BxV, axis=-1, keepdims=True))


def sample_token(logits_BxV: Array, keys_B: Array, sampling: Sampling | Filters) -> Array:
    """Draws a token per row under its key; the most likely one where the temperature is 0. Returns [B] int32."""
    filters = _filters(sampling)
    if filters.temperature is None:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    return _draw(_unnormalised(filter_logits(logits_BxV, filters)), keys_B)


def _draw(p_BxV: Array, keys_B: Array) -> Array:
    """Inverts the distribution function at two uniform numbers: one finds a block of tokens, one the token in it."""
    B, V = p_BxV.shape
    size = min(BLOCK, V)
    blocks = -(-V // size)
    p_BxNxS = jnp.pad(p_BxV, ((0, 0), (0, blocks * size - V))).reshape(B, blocks, size)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    block = _invert(jnp.sum(p_BxNxS, axis=-1), uniform[:, :1])
    inside = jnp.take_along_axis(p_BxNxS, block[:, None, None], axis=1)[:, 0]
    return block * size + _invert(inside, uniform[:, 1:])


def _invert(p_BxN: Array, uniform_Bx1: Array) -> Array:
    """The first entry at which the running sum exceeds uniform x the whole; never one that is 0."""
    total = jnp.cumsum(p_BxN, axis=-1)
    reached = (total > uniform_Bx1 * total[:, -1:]) & (p_BxN > 0)
    return jnp.argmax(reached, axis=-1).astype(jnp.int32)
