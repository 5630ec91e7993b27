"""The conformance kit for models: is a model that is called as `Transformer` is causal, and its cache exact?

    check_module(model)

Parameters are moved off their initial values by noise, as in testing.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gpt_jax.model import Cache, Mask, ModelConfig, Transformer
from gpt_jax.testing import ContractBroken, Report


def check_module(
    model: nn.Module | ModelConfig,
    *,
    params: Any = None,
    vocab_size: int = 0,
    length: int = 12,
    make_cache: Callable[[int, int], Any] | None = None,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Report:
    """Checks a model that is called as `Transformer` is.

    The properties, by the name that a failure begins with:
      causality: no logit changes by a bit with a later token.
      cached: a prompt and then single tokens through the cache give the full pass; so does a prompt padded on the left.
      packed: a document under `Mask(segments)` is what it is alone, and no bit of it changes with its neighbour.

    Args:
      model: a module, or the config of a Transformer. params: those to check; None makes some of `seed`.
      vocab_size: of the tokens tried; 0 is model.config's. length: tokens tried, at most the model's positions.
      make_cache: (rows, slots) -> empty cache; None is `Cache.empty` of model.config.
      tolerance: relative to the largest logit. seed: of parameters and tokens.

    Raises:
      ContractBroken: with a sentence for each property that broke.
    """
    model = Transformer(model) if isinstance(model, ModelConfig) else model
    config = getattr(model, "config", None)
    vocab_size = vocab_size or config.vocab_size
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (2, length)).astype(np.int32)
    if params is None:
        params = nn.unbox(jax.jit(model.init)(jax.random.key(seed), tokens)["params"])
        params = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), params)
    run = jax.jit(lambda tokens, **kwargs: model.apply({"params": params}, tokens, **kwargs))
    full = np.asarray(run(tokens).logits)
    scale = max(1.0, float(np.abs(full).max()))
    failures, skipped = [], []

    leaks = []
    for at in range(1, length):
        changed = tokens.copy()
        changed[:, at:] = (changed[:, at:] + 1) % vocab_size
        leaks.append(float(np.abs(np.asarray(run(changed).logits)[:, :at] - full[:, :at]).max()))
    if max(leaks) != 0:
        at = 1 + int(np.argmax(leaks))
        failures.append(f"causality: changing the tokens from {at} on changes earlier logits by {max(leaks):.2g}.")

    if make_cache is None and config is not None:
        make_cache = lambda rows, slots: Cache.empty(config, rows, slots)  # noqa: E731
    if make_cache is None:
        skipped.append("cached: the model has no config and no make_cache was given")
    else:
        gap = float(np.abs(_cached(run, tokens, make_cache(2, length)) - full).max()) / scale
        if not gap <= tolerance:
            failures.append(f"cached: decoding with the cache differs from the full pass by {gap:.2g}, relative.")
        gap = _ragged(run, tokens, make_cache(2, length), full) / scale
        if not gap <= tolerance:
            failures.append(f"cached: a prompt padded on the left differs from the prompt by {gap:.2g}, relative.")

    cut = length // 2
    segments = np.broadcast_to(np.where(np.arange(length) < cut, 1, 2), tokens.shape).astype(np.int32)
    positions = np.broadcast_to(
        np.where(np.arange(length) < cut, np.arange(length), np.arange(length) - cut), (2, length)
    )
    packing = dict(mask=Mask(segments_BxT=segments), positions=positions.astype(np.int32))
    packed = np.asarray(run(tokens, **packing).logits)[:, cut:]
    gap = float(np.abs(packed - np.asarray(run(tokens[:, cut:]).logits)).max()) / scale
    if not gap <= tolerance:
        failures.append(f"packed: a packed document is not what it is alone, its logits differ by {gap:.2g}, relative.")
    changed = np.where(segments == 1, (tokens + 1) % vocab_size, tokens)
    if gap := float(np.abs(np.asarray(run(changed, **packing).logits)[:, cut:] - packed).max()):
        failures.append(f"packed: another document in front changes a document's logits by {gap:.2g}.")
    report = Report(tuple(failures), (), tuple(skipped))
    if failures:
        raise ContractBroken(f"{type(model).__name__} breaks its promises:", report)
    return report


def _cached(run: Callable, tokens: np.ndarray, cache: Any) -> np.ndarray:
    """Logits of half of the tokens at once, then of the others one at a time."""
    at, pieces = tokens.shape[1] // 2, []
    for start, end in [(0, at), *((t, t + 1) for t in range(at, tokens.shape[1]))]:
        out = run(tokens[:, start:end], cache=cache)
        pieces, cache = [*pieces, np.asarray(out.logits)], out.cache
    return np.concatenate(pieces, axis=1)


def _ragged(run: Callable, tokens: np.ndarray, cache: Any, full: np.ndarray) -> float:
    """How far logits are off when the second row's prompt is shorter, with padding (position -1) on its left."""
    T, short = tokens.shape[1], tokens.shape[1] // 3
    positions = np.stack([np.arange(T), np.arange(T) - short]).astype(np.int32)
    prompt = np.stack([tokens[0], np.concatenate([np.zeros(short, np.int32), tokens[1, : T - short]])])
    at, worst = T // 2, 0.0
    for start, end in [(0, at), *((t, t + 1) for t in range(at, T))]:
        out = run(prompt[:, start:end], positions=np.maximum(positions, -1)[:, start:end], cache=cache)
        cache, logits = out.cache, np.asarray(out.logits)
        for t in range(start, end):
            for row in range(2):
                if positions[row, t] >= 0:
                    worst = max(worst, float(np.abs(logits[row, t - start] - full[row, positions[row, t]]).max()))
    return worst
