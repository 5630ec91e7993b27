"""What heads do (induction, previous token, duplicate token) and what they are worth (gates, ablation).

Attention is no evidence of cause: each score stands beside what happens to the loss when the head is cut out.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.inspect.forward import Subject, _forward, token_losses
from gpt_jax.model.taps import Taps


def repeated_tokens(
    rng: np.random.Generator, rows: int, vocab_size: int, length: int, shortest: int = 8
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random tokens that repeat: a random beginning, then a random passage twice. Its length and place vary by row.

    With one length or place a head that looks a fixed distance back would score as induction.

    Args:
      rows, length: of the array. vocab_size: tokens are uniform below it. shortest: least length of the passage.

    Returns:
      (tokens [rows, length], period [rows], start [rows]): tokens [start, start + period) come again right after; what
      is left at the end is random.
    """
    longest = length // 2
    period = rng.integers(min(shortest, longest), longest + 1, rows)
    start = rng.integers(0, length - 2 * period + 1)
    tokens = rng.integers(0, vocab_size, (rows, length))
    for row in range(rows):
        a, n = start[row], period[row]
        tokens[row, a + n : a + 2 * n] = tokens[row, a : a + n]
    return tokens.astype(np.int32), period, start


def pattern_scores(weights_LxBxHxTxT: Any, period_B: np.ndarray, start_B: np.ndarray) -> dict[str, np.ndarray]:
    """Mean attention of each head to where a pattern has it look, on texts of `repeated_tokens`.

    Args:
      weights_LxBxHxTxT: attention weights.

    Returns:
      {"induction": to i - period + 1 (what came after the token the last time), "duplicate": to i - period (the token
      the last time), both over i in the second passage, "previous": to i - 1 over all i > 0}, each [L, H].
    """
    weights = np.asarray(weights_LxBxHxTxT)
    _, B, _, T, _ = weights.shape
    induction, duplicate = [], []
    for row in range(B):
        n, a = int(period_B[row]), int(start_B[row])
        i = np.arange(a + n, a + 2 * n)
        induction.append(weights[:, row][:, :, i, i - n + 1].mean(-1))
        duplicate.append(weights[:, row][:, :, i, i - n].mean(-1))
    i = np.arange(1, T)
    return {
        "induction": np.mean(induction, axis=0),
        "duplicate": np.mean(duplicate, axis=0),
        "previous": weights[:, :, :, i, i - 1].mean((1, 3)),
    }


def head_patterns(
    subject: Subject, *, rows: int = 32, length: int = 64, seed: int = 0, avoid: tuple[int, ...] = ()
) -> dict[str, Any]:
    """`pattern_scores` of a model on fresh repeated random tokens, and what the repetition is worth to it.

    Args:
      avoid: ids (special tokens) that are not drawn.

    Returns:
      The scores [L, H]; "first_loss" and "second_loss": mean nats of a token in the first and the second passage (its
      own first token, which nothing foretells, left out).
    """
    config = subject.config
    if config.positions == "learned":
        length = min(length, config.max_positions)
    allowed = np.setdiff1d(np.arange(config.vocab_size), avoid)
    tokens, period, start = repeated_tokens(np.random.default_rng(seed), rows, len(allowed), length)
    tokens = allowed[tokens].astype(np.int32)
    output = subject(tokens, Taps(collect=("attention",)))
    out: dict[str, Any] = pattern_scores(output.intermediates["attention"], period, start)
    losses = np.asarray(token_losses(output.logits, tokens))
    first = [losses[r, max(0, start[r] - 1) : start[r] + period[r] - 1].mean() for r in range(rows)]
    second = [losses[r, start[r] + period[r] : start[r] + 2 * period[r] - 1].mean() for r in range(rows)]
    return out | {"first_loss": float(np.mean(first)), "second_loss": float(np.mean(second))}


def reach(subject: Subject, tokens_BxT: Any, window: int = 0) -> np.ndarray:
    """How far back heads look on texts, [L, H]: mean distance to a key in tokens, weighted by attention.

    Args:
      window: above 0, instead the part of attention at that distance or further: what a band of `window` would hide.
    """
    weights = subject(tokens_BxT, Taps(collect=("attention",))).intermediates["attention"]
    T = weights.shape[-1]
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    measured = (distance >= window) if window else jnp.maximum(distance, 0)
    return np.asarray(jnp.mean(jnp.sum(weights * measured, axis=-1), axis=(1, 3)))


@functools.partial(jax.jit, static_argnums=(0, 5))
def _loss(model: Any, params: Any, tokens: Array, gates: Array, fill: Array | None, causal: bool) -> Array:
    """Mean loss of texts [B, T] under gates [L, H]."""
    logits = _forward(model, params, tokens, Taps(gates_LxH=gates, fill_LxHxK=fill), causal).logits
    return jnp.mean(token_losses(logits, tokens))


def gated_loss(subject: Subject, tokens_BxT: Any, gates_LxH: Any, fill_LxHxK: Any = None) -> float:
    """The mean loss of texts with each head's output times its gate (and `fill` in the part that is missing)."""
    return float(_loss(subject.model, subject.params, jnp.asarray(tokens_BxT), gates_LxH, fill_LxHxK, subject.causal))


def head_importance(subject: Subject, tokens_BxT: Any) -> np.ndarray:
    """E |dL/dxi_h|, [L, H]: how much the loss of a text moves with a head's gate (Michel et al. 2019, equation 2)."""
    ones = jnp.ones((subject.config.num_layers, subject.config.num_heads))

    def one(params: Any, text: Array) -> Array:
        return jax.grad(_loss, argnums=3)(subject.model, params, text[None], ones, None, subject.causal)

    slopes = jax.jit(lambda params, texts: jax.lax.map(functools.partial(one, params), texts))
    return np.asarray(jnp.mean(jnp.abs(slopes(subject.params, jnp.asarray(tokens_BxT))), axis=0))


def ablate_heads(subject: Subject, tokens_BxT: Any, how: str = "zero") -> np.ndarray:
    """How much the mean loss rises when a head gives nothing ("zero") or its mean over texts and places ("mean").

    Returns:
      [L, H], nats per token; below 0 where the head does harm.
    """
    config = subject.config
    L, H = config.num_layers, config.num_heads
    tokens, fill = jnp.asarray(tokens_BxT), None
    if how == "mean":
        fill = jnp.mean(subject(tokens, Taps(collect=("heads",))).intermediates["heads"], axis=(1, 2))
    elif how != "zero":
        raise ValueError(f"how is {how!r}; 'zero' or 'mean'")
    ones = jnp.ones((L, H))
    whole = gated_loss(subject, tokens, ones, fill)
    out = np.zeros((L, H))
    for layer in range(L):
        for head in range(H):
            out[layer, head] = gated_loss(subject, tokens, ones.at[layer, head].set(0.0), fill) - whole
    return out
