"""Perplexity of a text longer than the context, and what a token's loss owes to the tokens before it.

A window of `size` tokens advances by `stride`, and only the targets that are new in it are scored: whatever the stride,
each target is scored once. Stride 1 gives every target all the context there is room for; stride `size` cuts the text.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.errors import UserError
from gpt_jax.model import Mask, Transformer
from gpt_jax.objectives.text import token_losses

_LOGITS = 1 << 26  # numbers in the logits that are held at a time


def check_length(model: Transformer, length: int) -> None:
    """Raises UserError if the model has not so many positions: learned ones refuse position >= max_positions."""
    config = model.config
    if length < 1:
        raise UserError(f"a context of {length} tokens is asked for; it must be at least 1.")
    if config.positions == "learned" and length > config.max_positions:
        raise UserError(
            f"a context of {length} tokens is asked for, but the model has {config.max_positions} learned positions."
        )


def windows(targets: int, size: int, stride: int) -> list[tuple[int, int, int]]:
    """Returns (start, first, end) of each window: it reads tokens [start, end) and scores targets [first, end).

    Target t is token t + 1. The windows' [first, end) are disjoint and make up [0, targets).

    Raises:
      UserError: a stride of less than 1, or of more than the size, which would leave targets without context.
    """
    _check_stride(stride, size)
    out, done = [], 0
    while done < targets:
        end = min(targets, done + stride if done else size)
        out.append((max(0, end - size), done, end))
        done = end
    return out


def _check_stride(stride: int, size: int) -> None:
    if not 1 <= stride <= size:
        raise UserError(f"stride is {stride}; it must be at least 1 and at most the window's size, {size}.")


@functools.partial(jax.jit, static_argnums=(0, 4))
def _losses(model: Transformer, params: Any, tokens_BxT: Array, targets_BxT: Array, chunk: int) -> Array:
    return token_losses(model, params, tokens_BxT, targets_BxT, mask=Mask(), chunk=chunk)[1]


def row_losses(model: Transformer, params: Any, rows_BxT1: np.ndarray, batch_size: int = 8) -> np.ndarray:
    """Negative log-likelihood of rows of T + 1 tokens, nats [B, T], computed `batch_size` rows at a time."""
    B, T = rows_BxT1.shape[0], rows_BxT1.shape[1] - 1
    check_length(model, T)
    size = min(batch_size, B)
    chunk = 0 if size * T * model.config.padded_vocab <= _LOGITS else max(1, _LOGITS // model.config.padded_vocab)
    out = np.empty((B, T), np.float32)
    for at in range(0, B, size):
        rows = rows_BxT1[at : at + size]
        padded = np.concatenate([rows, np.zeros((size - len(rows), T + 1), rows.dtype)]).astype(np.int32)
        out[at : at + size] = np.asarray(_losses(model, params, padded[:, :-1], padded[:, 1:], chunk))[: len(rows)]
    return out


def stream_losses(
    model: Transformer, params: Any, tokens: Sequence[int], *, size: int, stride: int, batch_size: int = 8
) -> np.ndarray:
    """Loss of each token of a text but the first, nats [n - 1], each scored exactly once.

    Args:
      tokens: the text [n]. size: of the window. stride: how far it advances. batch_size: windows at a time.

    Raises:
      UserError: fewer than two tokens, a window that the model's learned positions do not hold, a stride out of range.
    """
    _check_stride(stride, size)
    text = np.asarray(tokens)
    targets = len(text) - 1
    if targets < 1:
        raise UserError(f"a text of {len(text)} tokens has nothing to predict; it needs at least 2.")
    size = min(size, targets)
    check_length(model, size)
    plan = windows(targets, size, min(stride, size))  # a text shorter than the window is one window
    out, seen = np.full(targets, np.nan, np.float32), 0
    for at in range(0, len(plan), batch_size):
        part = plan[at : at + batch_size]
        rows = np.stack([text[end - size : end + 1] for _, _, end in part])
        for (_, first, end), losses in zip(part, row_losses(model, params, rows, batch_size), strict=True):
            out[first:end] = losses[size - (end - first) :]
            seen += end - first
    if seen != targets or np.isnan(out).any():
        raise ArithmeticError(f"{seen} of {targets} targets were scored, {np.isnan(out).sum()} of them are no number")
    return out


def strided_perplexity(
    model: Transformer, params: Any, tokens: Sequence[int], *, size: int, stride: int, batch_size: int = 8
) -> dict[str, float]:
    """Returns {'loss': nats per token, 'perplexity', 'tokens': scored, 'size', 'stride'}; see `stream_losses`."""
    losses = stream_losses(model, params, tokens, size=size, stride=stride, batch_size=batch_size).astype(np.float64)
    loss = float(losses.mean())
    return {"size": size, "stride": stride, "tokens": len(losses), "loss": loss, "perplexity": math.exp(min(loss, 700))}


def loss_by_position(
    model: Transformer, params: Any, tokens: Sequence[int], *, length: int, rows: int = 0, batch_size: int = 8
) -> dict[str, np.ndarray]:
    """Mean loss of the target at each position of rows cut from a text.

    Args:
      length: of a row. rows: at most so many, 0 is all that the text yields.

    Returns:
      {'loss': [length] nats, 'error': its standard error over rows, 'rows': their number}.
    """
    text = np.asarray(tokens)
    count = (len(text) - 1) // length
    count = min(count, rows) if rows else count
    if count < 1:
        raise UserError(f"a text of {len(text)} tokens has no row of {length} tokens and the one after it.")
    losses = row_losses(
        model, params, np.stack([text[i * length : (i + 1) * length + 1] for i in range(count)]), batch_size
    )
    return {"loss": losses.mean(0), "error": losses.std(0) / math.sqrt(count), "rows": np.int64(count)}


@functools.partial(jax.jit, static_argnums=0)
def _last_loss(model: Transformer, params: Any, tokens_BxT: Array, target_B: Array) -> Array:
    hidden, _ = model.apply({"params": params}, tokens_BxT, method="encode")
    logits = model.apply({"params": params}, hidden[:, -1], method="unembed")
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, target_B[:, None], axis=-1)[:, 0]


def loss_by_budget(
    model: Transformer,
    params: Any,
    tokens: Sequence[int],
    *,
    budgets: Sequence[int],
    targets: int = 256,
    reference: int = 0,
    batch_size: int = 32,
) -> dict[int, dict[str, float]]:
    """Loss of the same targets when the model sees exactly their last c tokens, for each budget c.

    Args:
      budgets: numbers of tokens. targets: how many, evenly spaced over the text.
      reference: the budget that the others are compared with, target by target; 0 is the largest.

    Returns:
      {c: {'loss': nats, 'error': its standard error, 'difference': to the reference's, 'difference_error': its standard
      error, far smaller than the loss's, 'tokens'}}.
    """
    text, longest = np.asarray(tokens), max(budgets)
    check_length(model, longest)
    check_length(model, min(budgets))
    if len(text) <= longest:
        raise UserError(f"a text of {len(text)} tokens has no target with {longest} tokens before it.")
    ends = np.unique(np.linspace(longest, len(text) - 1, min(targets, len(text) - longest)).astype(np.int64))
    each = {}
    for budget in budgets:
        losses = []
        for at in range(0, len(ends), batch_size):
            part = ends[at : at + batch_size]
            padded = np.concatenate([part, np.full(batch_size - len(part), part[-1])])
            rows = np.stack([text[end - budget : end] for end in padded]).astype(np.int32)
            losses.append(np.asarray(_last_loss(model, params, rows, text[padded].astype(np.int32)))[: len(part)])
        each[int(budget)] = np.concatenate(losses).astype(np.float64)
    against = each[reference or longest]

    def error(values: np.ndarray) -> float:
        return float(values.std() / math.sqrt(len(values)))

    return {
        budget: {
            "loss": float(values.mean()),
            "error": error(values),
            "difference": float((values - against).mean()),
            "difference_error": error(values - against),
            "tokens": len(values),
        }
        for budget, values in each.items()
    }
