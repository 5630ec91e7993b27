"""The conformance kit: does an objective, ours or yours, keep the contract? (Of models: testing_models.py.)

    check_objective(MyObjective(model), batch)

It runs on CPU, through the real train step; devices are compared where there are several
(XLA_FLAGS=--xla_force_host_platform_device_count=8 simulates eight). Each failure is a sentence that begins with the
property that broke and says by how much.

Parameters are moved off their initial values by noise: at a head of zeros, or a LoRA whose B is 0, most gradients are 0
and would agree whatever the bug.
"""

from __future__ import annotations

import copy
import dataclasses
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt_jax.errors import UserError
from gpt_jax.objectives.base import Objective
from gpt_jax.sharding import make_mesh, path_name
from gpt_jax.step import TrainStep, build_train_step, row_keys
from gpt_jax.train_state import split

TOLERANCE = 2e-5  # of float32 sums taken in another order, relative
NOISE = 0.02
STEP = 3  # the step at which everything is evaluated

_VALUE_ASKED = (jax.errors.ConcretizationTypeError, jax.errors.NonConcreteBooleanIndexError)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
      failures: a sentence for each property that broke; it begins with the property's name.
      without_gradient: names of trained parameters whose gradient is 0 everywhere: right for some (a head that this
        batch does not use), a bug for others.
      skipped: properties that could not be checked here, and why.
    """

    failures: tuple[str, ...]
    without_gradient: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


class ContractBroken(AssertionError):
    """Raised with every failure in its message, a line each; `report` has them apart."""

    def __init__(self, what: str, report: Report) -> None:
        super().__init__("\n".join([what, *report.failures]))
        self.report = report


def check_objective(
    objective: Objective, batch: Any, *, microbatches: int = 2, seed: int = 0, tolerance: float = TOLERANCE
) -> Report:
    """Runs the contract of `gpt_jax.objectives.base` on an objective.

    The properties, by the name that a failure begins with:
      one compilation: nothing asks for a value while it is traced.
      finite: loss, metrics and gradient.
      deterministic: the same batch under the same key gives the same bits, traced again too.
      total: the loss is the coef-weighted sum of the terms' values.
      micro-batches: n of them, with uneven numbers of targets, give the loss and gradient of one.
      devices: several give the loss and gradient of one.
      row keys: rows in another order, each with its own key, give the same sums: no draw knows a row's place.
      padding: what stands where the weight is 0 has no effect, and rows of weight 0 are as if they were not there.
      coefficients: 0 for a term leaves the bits of the other terms' values.
    Terms in `batch_terms` are no sums over rows and are exempt from micro-batches and padding.

    Args:
      objective: the plug-in.
      batch: as the data delivers it, NumPy, with rows that `microbatches` divides. Where it has 'target_weights' they
        are thinned unevenly. An objective that looks to the right needs 'segment_ids' (0 is padding) in it too.
      microbatches: pieces to compare with the whole. seed: of parameters and draws. tolerance: relative.

    Returns:
      The Report.

    Raises:
      ContractBroken: with a sentence for each property that broke.
    """
    failures: list[str] = []
    skipped: list[str] = []
    batch = _thinned(jax.tree.map(np.asarray, batch))
    try:
        step = _build(objective, batch, seed)
        params = _general_position(step, seed)
        once = _evaluate(step, params, batch)
    except _VALUE_ASKED as error:
        failures.append(
            f"one compilation: {_method_of(error)} asks for the value of an array that is only traced, so each batch "
            f"would need a compilation of its own: {str(error).splitlines()[0]}"
        )
        raise _broken(objective, failures) from None
    if not once.finite:
        raise _broken(objective, _not_finite(objective, step, params, batch, once, seed))

    failures += _deterministic(objective, step, params, batch, once, seed)
    failures += _total(objective, once, tolerance)
    failures += _row_keys(objective, params, batch, seed, tolerance)
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    if any(n % microbatches for n in rows):
        skipped.append(f"micro-batches: {microbatches} do not divide the rows")
    else:
        pieces = _evaluate(_build(objective, batch, seed, microbatches=microbatches), params, batch)
        if (gap := _gap(_without_batch_terms(objective, once), _without_batch_terms(objective, pieces))) > tolerance:
            failures.append(
                f"micro-batches: {microbatches} of them are not the whole batch, loss or gradient differ by {gap:.2g} "
                "(a mean taken inside `loss`, or a draw that depends on a row's place?)."
            )
    devices = max(n for n in range(1, len(jax.devices()) + 1) if all(r % n == 0 for r in rows))
    if devices == 1:
        skipped.append("devices: there is one here, or the rows do not divide")
    else:
        spread = _evaluate(_build(objective, batch, seed, devices=devices), params, batch)
        if (gap := _gap(once, spread)) > tolerance:
            failures.append(f"devices: {devices} are not one, loss or gradient differ by {gap:.2g}.")
    if any(name.rpartition("/")[2] == "target_weights" for name in _names(batch)):
        failures += _padding(objective, step, params, batch, seed, tolerance)
    else:
        skipped.append("padding: the batch has no 'target_weights'")
    failures += _coefficients(objective, params, batch, seed)
    if failures:
        raise _broken(objective, failures)
    zero = [path_name(p) for p, g in jax.tree_util.tree_leaves_with_path(once.gradient) if not np.any(g)]
    return Report((), tuple(zero), tuple(skipped))


@dataclasses.dataclass(frozen=True)
class _Result:
    loss: np.ndarray
    metrics: dict[str, np.ndarray]
    gradient: Any
    finite: bool


def _recorder() -> optax.GradientTransformation:
    """An optimizer that changes nothing and whose state is the last gradient: so the real train step shows it."""

    def zeros(tree: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, tree)

    return optax.GradientTransformation(zeros, lambda updates, state, params=None: (zeros(updates), updates))


def _build(objective: Any, batch: Any, seed: int, *, microbatches: int = 1, devices: int = 1) -> TrainStep:
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    options = dict(microbatches=microbatches, seed=seed, clip_norm=0.0)
    try:
        mesh = make_mesh(devices=jax.devices()[:devices])
        return build_train_step(objective, _recorder(), spec, mesh=mesh, **options)
    except UserError:  # sizes of parameters that the devices do not divide: only the rows are cut
        if devices == 1:
            raise
        mesh = make_mesh(data=devices, fsdp=1, devices=jax.devices()[:devices])
        return build_train_step(objective, _recorder(), spec, mesh=mesh, **options)


def _general_position(step: TrainStep, seed: int) -> Any:
    rng = np.random.default_rng(seed)

    def moved(x: np.ndarray) -> np.ndarray:
        return x + (NOISE * rng.normal(size=x.shape)).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(moved, jax.device_get(step.init(seed).all_params))


def _evaluate(step: TrainStep, params: Any, batch: Any, at: int = STEP) -> _Result:
    trained, frozen = split(params, (*step.objective.frozen, *step.optimizer.frozen))
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), step.abstract)
    state = dataclasses.replace(state, step=np.int32(at), params=trained, frozen=frozen)
    state, metrics = step(jax.tree.map(jax.device_put, state, step.shardings), step.put(batch))
    metrics = jax.device_get(metrics)
    finite = metrics["skipped"] == 0 and all(np.isfinite(v) for k, v in metrics.items() if k != "lr")
    values = {k: v for k, v in metrics.items() if k not in ("lr", "grad_norm", "skipped", "skipped_in_a_row")}
    return _Result(values.pop("loss"), values | {"grad_norm": metrics["grad_norm"]}, state.opt_state, bool(finite))


def _values(objective: Any) -> Callable[..., dict[str, tuple[Any, Any]]]:
    """(params, batch, keys) -> {term: (sum, weight)}, the step's forward pass with the keys in the open."""

    def run(params: Any, batch: Any, keys: Any) -> dict[str, tuple[Any, Any]]:
        batch = objective.prepare(batch, keys, jnp.asarray(STEP))
        if objective.needs_scores:
            batch = objective.weigh(batch, objective.score(params, batch, keys), jnp.asarray(STEP))
        sums, _ = objective.loss(params, batch, keys, True)
        weights = objective.weights(batch)
        return {term: (value, jnp.sum(weights.get(term, 1.0))) for term, value in sums.items()}

    return jax.jit(run)


def _gap(a: Any, b: Any) -> float:
    """The largest ||a - b|| of a leaf relative to ||a||, which counts as at least a thousandth of the whole's."""
    if isinstance(a, _Result):
        whole = (a.loss, a.metrics), (b.loss, b.metrics)
        return max(_gap(*whole), _gap(a.gradient, b.gradient))
    pairs = [
        (np.asarray(x, np.float64), np.asarray(y, np.float64))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    floor = max(1e-3 * np.sqrt(sum(np.sum(x**2) for x, _ in pairs)), 1e-12)
    gaps = [np.linalg.norm(x - y) / max(np.linalg.norm(x), floor) for x, y in pairs]
    return float(np.max(gaps, initial=0.0)) if np.isfinite(gaps).all() else float("inf")


def _same_bits(a: _Result, b: _Result) -> bool:
    pairs = zip(
        jax.tree.leaves((a.loss, a.metrics, a.gradient)), jax.tree.leaves((b.loss, b.metrics, b.gradient)), strict=True
    )
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def _broken(objective: Any, failures: list[str]) -> ContractBroken:
    return ContractBroken(f"{type(objective).__name__} breaks the contract:", Report(tuple(failures)))


def _method_of(error: Exception) -> str:
    names = [f.name for f in traceback.extract_tb(error.__traceback__)]
    asked = [n for n in names if n in ("prepare", "loss", "score", "weigh", "init", "weights")]
    return f"`{asked[-1]}`" if asked else "the objective (or a coefficient's schedule)"


def _not_finite(objective: Any, step: TrainStep, params: Any, batch: Any, result: _Result, seed: int) -> list[str]:
    from gpt_jax.step import gradients

    trained, frozen = split(params, objective.frozen)
    run = jax.jit(lambda p, f, b: gradients(objective, p, f, b, step=jnp.asarray(STEP), seed=seed, microbatches=1))
    loss, metrics, grads = jax.device_get(run(trained, frozen, batch))
    out = [] if np.isfinite(loss) else [f"finite: the loss is {loss}."]
    out += [f"finite: {name!r} is {value}." for name, value in metrics.items() if not np.isfinite(value)]
    bad = [path_name(p) for p, g in jax.tree_util.tree_leaves_with_path(grads) if not np.isfinite(g).all()]
    return out + ([f"finite: the gradient is not, in {', '.join(bad)}."] if bad else [])


def _deterministic(objective: Any, step: TrainStep, params: Any, batch: Any, once: _Result, seed: int) -> list[str]:
    again = _evaluate(step, params, batch)
    if not _same_bits(once, again):
        return [f"deterministic: the same batch under the same key twice differs by {_gap(once, again):.2g}."]
    other = _build(objective, batch, seed)
    if other.lower().as_text() == step.lower().as_text():
        return []
    again = _evaluate(other, params, batch)
    if _same_bits(once, again):
        return []
    return [
        f"deterministic: traced a second time, the same batch under the same key differs by {_gap(once, again):.2g} "
        "(a draw outside jax.random, or state that a method changes?)."
    ]


def _total(objective: Any, once: _Result, tolerance: float) -> list[str]:
    expected = 0.0
    for term, coef in objective.coefs.items():
        value = float(coef(jnp.asarray(STEP)) if callable(coef) else coef)
        expected += value * float(once.metrics.get(f"loss/{term}", 0.0))
    gap = abs(float(once.loss) - expected) / max(abs(expected), 1e-6)
    return (
        [] if gap <= tolerance else [f"total: the loss is not the weighted sum of its terms, by {gap:.2g}, relative."]
    )


def _without_batch_terms(objective: Any, result: _Result) -> Any:
    """What must not depend on micro-batches: all, or without the exempt terms the other terms' values."""
    if not objective.batch_terms:
        return result
    exempt = {f"loss/{term}" for term in objective.batch_terms} | {"grad_norm"}
    return {name: value for name, value in result.metrics.items() if name not in exempt}


def _row_keys(objective: Any, params: Any, batch: Any, seed: int, tolerance: float) -> list[str]:
    """Turns the rows that every part of the batch has, and their keys, by one place."""
    run = _values(objective)
    keys = row_keys(seed, STEP, jnp.arange(objective.num_rows(batch)))
    turned = min(leaf.shape[0] for leaf in jax.tree.leaves(batch))

    def turn(x: Any) -> Any:
        order = np.arange(x.shape[0])
        order[:turned] = np.roll(order[:turned], 1)
        return x[order]

    straight, other = run(params, batch, keys), run(params, jax.tree.map(turn, batch), turn(keys))
    out = []
    for term, values in straight.items():
        if (gap := _gap(values, other[term])) > tolerance:
            out.append(
                f"row keys: rows in another order, each with its own key, change the term {term!r} by {gap:.2g} "
                "(a draw that knows a row's place, or one key for all rows?)."
            )
    return out


def _names(batch: Any) -> list[str]:
    return [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(batch)]


def _rewrite(batch: Any, function: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Any:
    """Applies a function to each (sub-)batch that has target weights."""
    if not isinstance(batch, Mapping):
        return batch
    if "target_weights" in batch:
        return function({k: np.array(v) for k, v in batch.items()})
    return {name: _rewrite(part, function) for name, part in batch.items()}


def _thinned(batch: Any) -> Any:
    """Makes the numbers of targets uneven over the rows: from all of a row down to one."""

    def one(part: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        B, T = part["target_weights"].shape[:2]
        count = np.maximum(1, np.linspace(T, 1, B).astype(int))
        hidden = np.arange(T) >= count[:, None]
        part["target_weights"][hidden] = 0
        if "segment_ids" in part:
            part["segment_ids"][hidden] = 0
        return part

    return _rewrite(batch, one)


def _padding(objective: Any, step: TrainStep, params: Any, batch: Any, seed: int, tolerance: float) -> list[str]:
    """Other content where the weight is 0; then rows of weight 0 against no such rows."""
    rng = np.random.default_rng(seed)

    def without_half(part: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        half = part["target_weights"].shape[0] // 2
        part["target_weights"][half:] = 0
        if "segment_ids" in part:
            part["segment_ids"][half:] = 0
        return part

    def other_content(part: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        empty = part["target_weights"] == 0
        unseen = np.broadcast_to((empty.all(1))[:, None], empty.shape)  # nothing attends to these tokens
        unseen = unseen | (part["segment_ids"] == 0) if "segment_ids" in part else unseen
        for name, where in (("targets", empty), ("tokens", unseen)):
            if name in part:
                part[name][where] = rng.choice(part[name].ravel(), int(where.sum()))
        return part

    half = _rewrite(batch, without_half)
    out = []
    a, b = _evaluate(step, params, half), _evaluate(step, params, _rewrite(half, other_content))
    if not objective.batch_terms and (gap := _gap(a, b)) > tolerance:
        out.append(f"padding: what stands where the weight is 0 changes loss or gradient by {gap:.2g}.")
    kept = jax.tree.map(lambda x: x[: x.shape[0] // 2], half)
    run, keys = _values(objective), row_keys(seed, STEP, jnp.arange(objective.num_rows(half)))
    whole, alone = run(params, half, keys), run(params, kept, keys[: objective.num_rows(kept)])
    for term in whole:
        values = [s / w if w else 0.0 for s, w in (map(float, whole[term]), map(float, alone[term]))]
        gap = abs(values[0] - values[1]) / max(abs(values[1]), 1e-6)
        if term not in objective.batch_terms and gap > tolerance:
            out.append(f"padding: rows of weight 0 change the term {term!r} by {gap:.2g}, relative.")
    return out


def _with_coefs(objective: Any, coefs: Mapping[str, Any]) -> Any:
    """The same objective with other coefficients, also where its class computes them."""
    other = copy.copy(objective)
    kind = type(objective)
    object.__setattr__(other, "__class__", type(kind.__name__, (kind,), {"coefs": property(lambda self: dict(coefs))}))
    return other


def _coefficients(objective: Any, params: Any, batch: Any, seed: int) -> list[str]:
    if len(objective.coefs) < 2:
        return []
    keys = row_keys(seed, STEP, jnp.arange(objective.num_rows(batch)))
    whole, out = _values(objective)(params, batch, keys), []
    for term in objective.coefs:
        less = _values(_with_coefs(objective, {**objective.coefs, term: 0.0}))(params, batch, keys)
        for other in objective.coefs:
            if other != term and any(map(lambda x, y: float(x) != float(y), whole[other], less[other])):
                gap = _gap(whole[other], less[other])
                out.append(f"coefficients: 0 for {term!r} changes the value of {other!r} by {gap:.2g}, relative.")
    return out
