"""The conformance kit: does an objective, ours or yours, keep the contract? Does a model keep its promises?

    check_objective(MyObjective(model), batch)

runs on CPU; devices are compared where there are several (XLA_FLAGS=--xla_force_host_platform_device_count=8 simulates
eight). Each failure is a sentence: which property broke, and by how much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from gpt_jax.model import Cache, Mask, ModelConfig, Transformer
from gpt_jax.objectives.base import Objective
from gpt_jax.sharding import make_mesh, path_name
from gpt_jax.step import build_train_step, gradients, split

TOLERANCE = 2e-5  # of float32 sums taken in another order, relative to the largest value


@dataclasses.dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
      failures: a sentence for each property that broke. without_gradient: names of trained parameters whose gradient is
        0 everywhere: right for some (a head that this batch does not use), a bug for others.
      skipped: properties that could not be checked here, and why.
    """

    failures: tuple[str, ...]
    without_gradient: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


class ContractBroken(AssertionError):
    """Raised with every failure in its message, a line each."""


def check_objective(objective: Objective, batch: Any, *, microbatches: int = 2, seed: int = 0) -> Report:
    """Runs the contract of `gpt_jax.objectives.base` on an objective.

    Checked: finite loss and gradients; the same result twice; n micro-batches give the gradient of one, with uneven
    numbers of targets and with dropout as the model has it; several devices give that of one; rows of weight 0 have no
    effect; a coefficient of 0 leaves the other terms' values; one compilation for all batches.

    Args:
      objective: the plug-in.
      batch: as the data delivers it, NumPy; its rows must divide by `microbatches` and by the devices. Where it has
        'target_weights' [B, T], they are thinned unevenly.
      microbatches: pieces to compare with the whole.
      seed: of parameters and draws.

    Returns:
      The Report.

    Raises:
      ContractBroken: with a sentence for each property that broke.
    """
    batch = jax.tree.map(np.asarray, _thinned(batch))
    state = _build(objective, batch, 1, 1, seed).init(seed)
    params = jax.device_get(state.all_params)
    once = _evaluate(objective, params, batch, seed, 1)
    failures, skipped = _finite(once), []

    again = _evaluate(objective, params, batch, seed, 1)
    if gap := _gap(once, again):
        failures.append(f"not deterministic: the same batch under the same key twice differs by {gap:.2g}.")

    pieces = _evaluate(objective, params, batch, seed, microbatches)
    if (gap := _gap(_by_rows(objective, once), _by_rows(objective, pieces))) > TOLERANCE:
        failures.append(
            f"{microbatches} micro-batches are not the whole batch: loss or gradient differ by {gap:.2g} "
            "(a mean taken inside `loss`, or a draw that depends on a row's place in its micro-batch?)."
        )

    rows = objective.num_rows(batch)
    devices = max(n for n in (1, 2, 4, 8) if n <= len(jax.devices()) and rows % n == 0)
    if devices == 1:
        skipped.append("several devices: there is one here, or the rows do not divide")
    else:
        spread = _on_devices(objective, params, batch, seed, devices)
        if (gap := abs(spread - float(once[0])) / max(abs(float(once[0])), 1e-6)) > TOLERANCE:
            failures.append(f"{devices} devices are not one: the loss differs by {gap:.2g}, relative.")

    padded = _without_second_half(batch)
    if padded is None:
        skipped.append("padding: the batch has no 'target_weights'")
    else:
        noisy, half = padded
        a = _evaluate(objective, params, half, seed, 1)
        b = _evaluate(objective, params, noisy, seed, 1)
        if not objective.batch_terms and (gap := _gap(a[:1] + a[2:], b[:1] + b[2:])) > TOLERANCE:
            failures.append(f"padding leaks: rows of weight 0 change loss or gradient by {gap:.2g}.")

    failures += _zero_coefficients(objective, params, batch, seed, once)
    failures += _one_compilation(objective, batch, seed)
    if failures:
        raise ContractBroken("\n".join([f"{type(objective).__name__} breaks the contract:", *failures]))
    zero = [path_name(p) for p, g in jax.tree_util.tree_leaves_with_path(once[2]) if not np.any(np.asarray(g))]
    return Report((), tuple(zero), tuple(skipped))


def check_module(config: ModelConfig, *, length: int = 12, seed: int = 0) -> Report:
    """Checks a model: no token sees a later one; cached decoding is the full forward pass; packed documents are alone.

    Args:
      config: its config. length: tokens tried, at most max_positions. seed: of parameters and tokens.

    Raises:
      ContractBroken: with a sentence for each property that broke.
    """
    model = Transformer(config)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (2, length)).astype(np.int32)
    params = nn.unbox(model.init(jax.random.key(seed), tokens))
    run = jax.jit(lambda tokens, **kwargs: model.apply(params, tokens, **kwargs).logits)
    full, failures = np.asarray(run(tokens)), []

    at = length // 2
    changed = tokens.copy()
    changed[:, at:] = (changed[:, at:] + 1) % config.vocab_size
    if gap := float(np.abs(run(changed)[:, :at] - full[:, :at]).max()):
        failures.append(f"not causal: changing tokens from {at} on changes earlier logits by {gap:.2g}.")

    extend = jax.jit(lambda tokens, cache: model.apply(params, tokens, cache=cache))
    first = extend(tokens[:, :at], Cache.empty(config, 2, length))
    cached = [first.logits]
    cache = first.cache
    for t in range(at, length):
        out = extend(tokens[:, t : t + 1], cache)
        cached, cache = [*cached, out.logits], out.cache
    if (gap := float(np.abs(np.concatenate(cached, axis=1) - full).max())) > 1e-4:
        failures.append(f"cached decoding differs from the full forward pass by {gap:.2g}.")

    segments = np.where(np.arange(length) < at, 1, 2)[None].repeat(2, 0).astype(np.int32)
    positions = np.where(np.arange(length) < at, np.arange(length), np.arange(length) - at)[None].repeat(2, 0)
    packed = run(tokens, mask=Mask(segments_BxT=jnp.asarray(segments)), positions=jnp.asarray(positions))
    alone = run(tokens[:, at:])
    if (gap := float(np.abs(packed[:, at:] - alone).max())) > 1e-4:
        failures.append(f"a packed document is not what it is alone: logits differ by {gap:.2g}.")
    if failures:
        raise ContractBroken("\n".join([f"{config} breaks its promises:", *failures]))
    return Report(())


@dataclasses.dataclass(frozen=True)
class _WithCoefs:
    """An objective with other coefficients."""

    inner: Objective
    coefs: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _build(objective: Any, batch: Any, microbatches: int, devices: int, seed: int) -> Any:
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    mesh = make_mesh(devices=jax.devices()[:devices])
    return build_train_step(objective, optax.sgd(0.0), spec, mesh=mesh, microbatches=microbatches, seed=seed)


def _evaluate(objective: Any, params: Any, batch: Any, seed: int, microbatches: int) -> tuple[Any, dict, Any]:
    """(loss, metrics, gradient) of a batch, traced and compiled afresh."""
    trained, frozen = split(params, objective.frozen)

    def run(trained: Any, frozen: Any, batch: Any) -> Any:
        return gradients(objective, trained, frozen, batch, step=jnp.asarray(3), seed=seed, microbatches=microbatches)

    return jax.device_get(jax.jit(run)(trained, frozen, batch))


def _by_rows(objective: Objective, result: tuple[Any, dict, Any]) -> Any:
    """What must not depend on micro-batches: all, or without the loss's exempt terms the other terms' values."""
    loss, metrics, grads = result
    if not objective.batch_terms:
        return loss, metrics, grads
    exempt = {f"loss/{term}" for term in objective.batch_terms} | {"loss"}
    return {name: value for name, value in metrics.items() if name not in exempt}


def _gap(a: Any, b: Any) -> float:
    """The largest difference, relative to the largest value of its leaf (at least a thousandth)."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        worst = max(worst, float(np.max(np.abs(x - y), initial=0.0) / max(np.max(np.abs(x), initial=0.0), 1e-3)))
    return worst


def _finite(result: tuple[Any, dict, Any]) -> list[str]:
    loss, metrics, grads = result
    out = [] if np.isfinite(loss) else [f"the loss is {loss}."]
    out += [f"the metric {name!r} is {value}." for name, value in metrics.items() if not np.isfinite(value)]
    bad = [path_name(p) for p, g in jax.tree_util.tree_leaves_with_path(grads) if not np.isfinite(g).all()]
    return out + ([f"the gradient is not finite in {', '.join(bad)}."] if bad else [])


def _thinned(batch: Any) -> Any:
    """Makes the numbers of targets uneven over the rows, wherever there are target weights."""

    def one(path: Any, leaf: Any) -> Any:
        if path_name(path).rpartition("/")[2] != "target_weights":
            return leaf
        B, T = leaf.shape
        count = np.maximum(1, np.linspace(T, 1, B).astype(int))
        return np.asarray(leaf) * (np.arange(T) < count[:, None]).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, batch)


def _without_second_half(batch: Any) -> tuple[Any, Any] | None:
    """(batch whose second half has weight 0 and other tokens, its first half alone), or None without weights."""
    names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(batch)]
    if not any(name.endswith("target_weights") for name in names):
        return None

    def blank(path: Any, leaf: Any) -> Any:
        leaf, name = np.array(leaf), path_name(path).rpartition("/")[2]
        half = leaf.shape[0] // 2
        if name == "target_weights":
            leaf[half:] = 0.0
        elif name in ("tokens", "targets"):
            leaf[half:] = np.flip(leaf[:half], axis=-1)[: leaf.shape[0] - half]
        return leaf

    noisy = jax.tree_util.tree_map_with_path(blank, batch)
    return noisy, jax.tree.map(lambda x: x[: x.shape[0] // 2], noisy)


def _on_devices(objective: Any, params: Any, batch: Any, seed: int, devices: int) -> float:
    step = _build(objective, batch, 1, devices, seed)
    state = step.init(seed)
    trained, frozen = split(params, (*objective.frozen, *step.optimizer.frozen))
    state = dataclasses.replace(
        state,
        step=jax.device_put(np.int32(3), step.shardings.step),
        params=jax.device_put(trained, step.shardings.params),
        frozen=jax.device_put(frozen, step.shardings.frozen),
    )
    return float(step(state, step.put(batch))[1]["loss"])


def _zero_coefficients(objective: Any, params: Any, batch: Any, seed: int, once: Any) -> list[str]:
    if len(objective.coefs) < 2:
        return []
    out = []
    for term in objective.coefs:
        changed = _WithCoefs(objective, {**objective.coefs, term: 0.0})
        metrics = _evaluate(changed, params, batch, seed, 1)[1]
        for other in objective.coefs:
            gap = _gap(once[1][f"loss/{other}"], metrics[f"loss/{other}"])
            if other != term and gap > 1e-6:
                out.append(f"a coefficient of 0 for {term!r} changes the value of {other!r} by {gap:.2g}.")
    return out


def _one_compilation(objective: Any, batch: Any, seed: int) -> list[str]:
    traces = _count_calls(objective, "loss")
    step = _build(traces.objective, batch, 1, 1, seed)
    state = step.init(seed)
    first = None
    for turn in range(3):
        rolled = jax.tree.map(lambda x, turn=turn: np.roll(x, turn, axis=0), batch)
        state, _ = step(state, step.put(rolled))
        first = traces.count if first is None else first
    if traces.count != first:
        return [f"three batches of one shape compile more than once: `loss` was traced {traces.count} times."]
    return []


@dataclasses.dataclass
class _Counted:
    objective: Any = None
    count: int = 0


def _count_calls(objective: Any, method: str) -> _Counted:
    counted = _Counted()
    original: Callable[..., Any] = getattr(objective, method)

    class Counting:
        def __getattr__(self, name: str) -> Any:
            if name == method:
                return call
            return getattr(objective, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        counted.count += 1
        return original(*args, **kwargs)

    counted.objective = Counting()
    return counted
