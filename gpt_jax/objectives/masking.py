"""Which tokens of a row are hidden and what stands in their place: the maskers of BERT, SpanBERT, ELECTRA, the article.

Everything runs inside the jitted update on the whole batch and draws under one key per row.

Selection of n = min(max_predictions, max(1, round(rate * length))) of a row's `length` tokens, among those that may be
hidden:

    tokens       n of them, uniformly, without replacement (BERT, Devlin et al. 2019)
    spans        whole spans of truncated geometric length (p = 0.2, at most 10: 3.8 on average; SpanBERT, Joshi et al.
                 2020), or of `span` tokens each, in random order until n tokens are reached; the last one is cut
    replacement  n draws with replacement; a token drawn twice counts twice (ELECTRA's code)
    iid          each with probability `rate`; no exact number
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.errors import UserError, choose
from gpt_jax.model import Mask
from gpt_jax.model.random import fold_name

SELECTIONS = ("tokens", "spans", "replacement", "iid")
SPAN_STOP = 0.2  # probability that a span ends at a token
SPAN_MAX = 10


def real_tokens(batch: Mapping[str, Array]) -> Array:
    """Which tokens are text, [B, T]: segment 0 is padding; where a batch has no segments, weight 0 is."""
    if "segment_ids" in batch:
        return (batch["segment_ids"] > 0) & (batch["target_weights"] > 0)
    return batch["target_weights"] > 0


def bidirectional_mask(batch: Mapping[str, Array]) -> Mask:
    """Every token sees its whole document, padding excluded."""
    segments = batch["segment_ids"] if "segment_ids" in batch else (batch["target_weights"] > 0).astype(jnp.int32)
    return Mask("bidirectional", segments_BxT=segments)


def is_one_of(tokens: Array, ids: Sequence[int]) -> Array:
    """Whether each token is one of a few ids."""
    found = jnp.zeros(tokens.shape, bool)
    for i in ids:
        found |= tokens == i
    return found


def check_selection(select: str, rate: float, max_predictions: int, span: int = 0) -> None:
    """Raises UserError for options of a selection that are out of range."""
    choose("objective.select", select, SELECTIONS)
    if not 0 < rate <= 1:
        raise UserError(f"objective.rate is {rate!r}; it must be in (0, 1].")
    if max_predictions < 0:
        raise UserError(f"objective.max_predictions is {max_predictions!r}; it must be 0 (no bound) or more.")
    if span < 0 or (span and select != "spans"):
        raise UserError(
            f"objective.span is {span!r} with select={select!r}; it is the tokens of each of select='spans'."
        )


def check_shares(shares: Sequence[float]) -> None:
    """Raises UserError for parts ([MASK], random, kept) that do not make up a whole."""
    if len(shares) != 3 or min(shares) < 0 or not abs(sum(shares) - 1) <= 1e-6:
        raise UserError(f"objective.shares is {shares!r}; three parts that sum to 1: [MASK], a random token, kept.")


def check_specials(vocab_size: int, mask_token: int, specials: Sequence[int]) -> tuple[int, ...]:
    """Returns the special ids in order, [MASK] among them; raises UserError for one outside the vocabulary."""
    every = tuple(sorted({mask_token, *specials}))
    for i in every:
        if not 0 <= i < vocab_size:
            raise UserError(f"the special token {i} is not in the model's vocabulary of {vocab_size}.")
    if len(every) > vocab_size - 2:
        raise UserError(f"a vocabulary of {vocab_size} with {len(every)} special tokens leaves none to draw.")
    return every


def budget(length: int, rate: float, max_predictions: int = 0) -> np.ndarray:
    """Returns how many tokens are selected in a row of 0, 1, ..., `length` tokens, [length + 1]."""
    most = max_predictions or length
    return np.array([min(most, n, max(1, round(rate * n))) for n in range(length + 1)], np.int32)


def select_tokens(
    keys: Array,
    batch: Mapping[str, Array],
    eligible: Array,
    *,
    select: str,
    rate: float,
    max_predictions: int = 0,
    span: int = 0,
) -> Array:
    """How often each token is selected: 0 or 1, more where draws are with replacement.

    Args:
      keys: [B], one per row. batch: rows of text. eligible: [B, T], tokens that may be hidden.
      select, rate, max_predictions, span: see the module.

    Returns:
      [B, T] float32.
    """
    keys = fold_name(keys, "select")
    real = real_tokens(batch)
    T = real.shape[1]
    if select == "iid":
        return (eligible & (_uniform(keys, T) < rate)).astype(jnp.float32)
    wanted = jnp.asarray(budget(T, rate, max_predictions))[jnp.sum(real, axis=1)]
    possible = jnp.sum(eligible, axis=1)
    if select == "replacement":
        wanted = jnp.where(possible > 0, wanted, 0)
        places = jnp.argsort(~eligible, axis=1, stable=True)  # of the eligible ones first
        draws = jnp.floor(_uniform(keys, int(budget(T, rate, max_predictions)[-1])) * possible[:, None])
        drawn = jnp.take_along_axis(places, jnp.minimum(draws.astype(jnp.int32), T - 1), axis=1)
        used = (jnp.arange(drawn.shape[1]) < wanted[:, None]).astype(jnp.float32)
        return jax.vmap(lambda row, place, new: row.at[place].add(new))(jnp.zeros(real.shape), drawn, used)
    priority = jnp.where(eligible, _uniform(fold_name(keys, "order"), T), 2.0)
    if select == "spans":
        lengths = jnp.full(real.shape, span) if span else span_lengths(fold_name(keys, "lengths"), T)
        priority = span_priority(priority, lengths, _stretch(batch, eligible), span or SPAN_MAX)
    return first(priority, jnp.minimum(wanted, possible)).astype(jnp.float32)


def first(priority: Array, count: Array) -> Array:
    """Which `count` [B] entries of each row of `priority` [B, T] are least; the left of equal ones first."""
    order = jnp.argsort(priority, axis=1, stable=True)
    return jnp.argsort(order, axis=1) < count[:, None]


def span_lengths(keys: Array, count: int) -> Array:
    """Lengths of spans, [B, count]: geometric, renormalised on 1 ... SPAN_MAX."""
    p = SPAN_STOP * (1 - SPAN_STOP) ** np.arange(SPAN_MAX)
    cumulative = np.cumsum(p / p.sum())[:-1]
    return 1 + jnp.searchsorted(jnp.asarray(cumulative, jnp.float32), _uniform(keys, count), side="right")


def span_priority(priority: Array, lengths: Array, stretch: Array, longest: int = SPAN_MAX) -> Array:
    """The least priority of the spans that cover a token, if one begins at every token.

    So the n tokens of least priority are the spans taken in the order of their priorities, the last one cut.

    Args:
      priority: of the span that begins at a token, [B, T]. lengths: of that span. stretch: spans stay within one.
      longest: of the lengths.
    """
    least, T = priority, priority.shape[1]
    for back in range(1, min(longest, T)):
        begun, length, same = (x[:, : T - back] for x in (priority, lengths, stretch))
        reaches = (length > back) & (same == stretch[:, back:])
        least = least.at[:, back:].min(jnp.where(reaches, begun, 2.0))
    return jnp.where(priority < 2.0, least, 2.0)


def _stretch(batch: Mapping[str, Array], eligible: Array) -> Array:
    """Numbers the runs of tokens that may be hidden and belong to one document, [B, T]."""
    begins = ~eligible
    if "segment_ids" in batch:
        begins = begins.at[:, 1:].max(batch["segment_ids"][:, 1:] != batch["segment_ids"][:, :-1])
    return jnp.cumsum(begins, axis=1)


def ordinary_tokens(
    keys: Array, length: int, vocab_size: int, specials: Sequence[int], other_than: Array | None = None
) -> Array:
    """Draws tokens uniformly from the vocabulary without its specials, [B, length].

    Args:
      keys: [B]. specials: in order. other_than: [B, length], an ordinary token at each place that is not drawn there.
    """
    count = vocab_size - len(specials) - (other_than is not None)
    drawn = jax.vmap(lambda key: jax.random.randint(key, (length,), 0, count))(keys)
    if other_than is not None:
        rank = other_than - sum((other_than > s).astype(jnp.int32) for s in specials)
        drawn += drawn >= rank
    for s in specials:
        drawn += drawn >= s
    return drawn


def replace_shares(
    keys: Array, tokens: Array, selected: Array, shares: Sequence[float], mask_token: int, random_tokens: Array
) -> Array:
    """BERT's replacement: [MASK], a random token or the token itself, with probabilities `shares`. [B, T]."""
    kind = _uniform(fold_name(keys, "kind"), tokens.shape[1])
    replaced = jnp.where(kind < shares[0] + shares[1], random_tokens, tokens)
    replaced = jnp.where(kind < shares[0], mask_token, replaced)
    return jnp.where(selected, replaced, tokens)


def replace_but(
    keys: Array, tokens: Array, selected: Array, masks: int, mask_token: int, random_tokens: Array
) -> Array:
    """The article's replacement: `masks` of the selected are [MASK], the others random tokens. [B, T]."""
    order = jnp.where(selected, _uniform(fold_name(keys, "masks"), tokens.shape[1]), 2.0)
    masked = first(order, jnp.minimum(masks, jnp.sum(selected, axis=1)))
    return jnp.where(masked, mask_token, jnp.where(selected, random_tokens, tokens))


def slots(weights: Array, count: int) -> Array:
    """Places of the tokens of positive weight, in order, and then others up to `count`: [B, count] of [B, T]."""
    return jnp.argsort(weights <= 0, axis=1, stable=True)[:, :count]


def at_slots(values: Array, slots_BxN: Array) -> Array:
    """Picks values [B, T, ...] at places [B, N]."""
    index = slots_BxN.reshape(*slots_BxN.shape, *(1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1)


def _uniform(keys: Array, length: int) -> Array:
    return jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
