"""The train step: the only jitted update in the codebase.

prepare (whole batch) -> [score, weigh] -> micro-batches of sum_k coef_k sums_k / W_k -> gradients added in float32 ->
one optimizer update. W_k is the weight of term k over the whole global batch, so n micro-batches give the full
batch's gradient, uneven token counts and dropout included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_jax.compiler_flags import options_on
from gpt_jax.errors import UserError, nearest
from gpt_jax.memory import return_freed_memory
from gpt_jax.objectives.base import Objective
from gpt_jax.optim import Optimizer
from gpt_jax.sharding import (
    DEFAULT_RULES,
    Rules,
    batch_shardings,
    make_mesh,
    param_shardings,
    path_name,
    state_shardings,
    unbox,
)
from gpt_jax.train_state import TrainState, join, split


def row_keys(seed: int, step: Array | int, rows: Array) -> Array:
    """Returns one key per row: fold_in(fold_in(key(seed), step), row). Threefry, whatever jax's default."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def cut(tree: Any, n: int) -> Any:
    """Cuts every leaf's rows into n micro-batches: [B, ...] -> [n, B/n, ...]; micro-batch j has rows j, j+n, ..."""

    def one(leaf: Array) -> Array:
        return jnp.swapaxes(leaf.reshape(leaf.shape[0] // n, n, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(one, tree)


def uncut(tree: Any) -> Any:
    """Puts rows back together that `cut` took apart: [n, B/n, ...] -> [B, ...]."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), tree)


def total_loss(objective: Objective, sums: dict, totals: dict, step: Array, pieces: Array | int) -> Array:
    """sum_k coef_k S_k / W_k: 0 where W_k is 0; terms that are not sums over rows are averaged over micro-batches."""
    total = jnp.zeros((), jnp.float32)
    check_terms(objective, sums, totals)
    for term, coef in objective.coefs.items():
        if is_off(coef):
            continue
        value = coef(step) if callable(coef) else coef
        if term in objective.batch_terms:
            total += value * sums[term] / pieces
        else:
            total += value * ratio(sums[term], totals[term])
    return total


def is_off(coef: Any) -> bool:
    """Whether a coefficient is the constant 0: its term is left out when tracing."""
    return isinstance(coef, (int, float)) and coef == 0


def check_terms(objective: Objective, sums: dict, totals: dict) -> None:
    """Raises UserError for a term that lacks its loss, its weights or its coefficient."""
    coefs = objective.coefs
    for term in coefs:
        if term not in sums:
            raise UserError(
                f"the objective has a coefficient for {term!r}{nearest(term, sums)}, "
                f"but its loss has only: {', '.join(sums)}."
            )
        if term not in totals and term not in objective.batch_terms:
            raise UserError(
                f"the objective's prepare sets no weights for its term {term!r}{nearest(term, totals)}; "
                f"it sets: {', '.join(totals) or 'none'}."
            )
    for term in sums:
        if term not in coefs:
            raise UserError(
                f"the objective's loss has a term {term!r} without a coefficient (0 leaves it out); "
                f"coefs has: {', '.join(coefs)}."
            )


def ratio(total: Array, weight: Array) -> Array:
    """total / weight, 0 where the weight is 0, also in the gradient."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)


def prepared(
    objective: Objective, params: Any, batch: Any, *, step: Array, seed: int, microbatches: int = 1
) -> tuple[Any, Array, dict[str, Array]]:
    """Corrupts and weighs a global batch: what comes before the loss.

    Args:
      objective: the plug-in. params: all of them, for weights that depend on a model. batch: as the data delivers it.
      step, seed: give every row its key. microbatches: pieces in which rows are scored.

    Returns:
      (batch, keys of its rows, {term: weight of the whole batch}).
    """
    with jax.named_scope("prepare"):  # a name that forensics tells
        keys = row_keys(seed, step, jnp.arange(objective.num_rows(batch)))
        batch = objective.prepare(batch, keys, step)
    if objective.needs_scores:
        fixed = jax.tree.map(lax.stop_gradient, params)
        batch = objective.weigh(batch, _scores(objective, fixed, batch, keys, microbatches), step)
    totals = {term: jnp.sum(weight, dtype=jnp.float32) for term, weight in objective.weights(batch).items()}
    return batch, keys, totals


def _scores(objective: Objective, params: Any, batch: Any, keys: Array, microbatches: int) -> Any:
    """The objective's scores of all rows, made in micro-batches."""
    if microbatches == 1:
        return objective.score(params, batch, keys)
    pieces = cut((batch, keys), microbatches)
    return uncut(lax.scan(lambda _, piece: (None, objective.score(params, *piece)), None, pieces)[1])


def gradients(
    objective: Objective,
    params: Any,
    frozen: Any,
    batch: Any,
    *,
    step: Array,
    seed: int,
    microbatches: int,
    active: Array | None = None,
) -> tuple[Array, dict[str, Array], Any]:
    """Loss, metrics and gradient of a global batch.

    Args:
      objective: the plug-in. params, frozen: see TrainState. batch: as the data delivers it.
      step, seed: give every row its key. microbatches: pieces the batch is processed in.
      active: how many of them to process; the rest hold rows of weight 0 (a growing batch). None is all.

    Returns:
      (loss, metrics by name, gradient with respect to `params`, float32).
    """
    batch, keys, totals = prepared(
        objective, join(params, frozen), batch, step=step, seed=seed, microbatches=microbatches
    )

    processed = microbatches if active is None else active

    def piece_loss(params: Any, piece: Any, keys: Array) -> tuple[Array, tuple[dict, dict]]:
        sums, metrics = objective.loss(join(params, frozen), piece, keys, True)
        total = total_loss(objective, sums, totals, step, processed)
        return total, ({term: value for term, value in sums.items() if not is_off(objective.coefs[term])}, metrics)

    piece_gradient = functools.partial(jax.value_and_grad(piece_loss, has_aux=True), params)
    if microbatches == 1:
        (loss, (sums, metrics)), grads = piece_gradient(batch, keys)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    else:
        pieces = cut((batch, keys), microbatches)
        (loss, (sums, metrics)), grads = accumulated(piece_gradient, pieces, active)

    values = {"loss": loss}
    for term, value in sums.items():
        plain = value / processed if term in objective.batch_terms else ratio(value, totals[term])
        values[f"loss/{term}"] = plain
    values |= {name: ratio(value, weight) for name, (value, weight) in metrics.items()}
    return loss, values, grads


def accumulated(of_piece: Callable[..., Any], pieces: tuple, active: Array | None = None) -> Any:
    """Adds up, in float32, what `of_piece(*piece)` returns of each micro-batch.

    Args:
      pieces: of `cut`. active: only the first so many of them; None is all.
    """

    def add(sums: Any, piece: tuple) -> tuple[Any, None]:
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, of_piece(*piece)), None

    first = jax.eval_shape(lambda pieces: of_piece(*jax.tree.map(lambda x: x[0], pieces)), pieces)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), first)
    if active is None:
        return lax.scan(add, zeros, pieces)[0]

    def add_numbered(j: Array, sums: Any) -> Any:
        return add(sums, jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, j, keepdims=False), pieces))[0]

    return lax.fori_loop(0, active, add_numbered, zeros)


def updated(
    state: TrainState,
    loss: Array,
    grads: Any,
    optimizer: Optimizer,
    *,
    clip_norm: float,
    ema: float,
    platform: str,
) -> tuple[TrainState, dict[str, Array]]:
    """Updates a state by a gradient; one that is not finite is counted, and changes nothing else.

    Args:
      clip_norm, ema: see `build_train_step`. platform: what it runs on.

    Returns:
      (the state after the step, what it measures).
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12)) if clip_norm else 1.0

    def advance() -> Any:
        with jax.named_scope("optimizer"):  # a name that forensics tells
            clipped = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), grads, state.params)
            updates, opt_state = optimizer.tx.update(clipped, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        average = jax.tree.map(lambda a, p: a + (1.0 - ema) * (p - a), state.ema, params) if ema else state.ema
        return params, opt_state, average

    old = (state.params, state.opt_state, state.ema)
    params, opt_state, average = keep_unless(finite, advance, old, platform)
    good, bad = state.skipped * jnp.array([0, 1]), state.skipped + 1  # a good update ends the row of bad ones
    skipped = jnp.where(finite, good, bad)
    new = dataclasses.replace(
        state, step=state.step + 1, params=params, opt_state=opt_state, ema=average, skipped=skipped
    )
    return new, {
        "grad_norm": norm,
        "lr": optimizer.schedule(state.step - state.skipped[1]),
        "skipped": skipped[1].astype(jnp.float32),
        "skipped_in_a_row": skipped[0].astype(jnp.float32),
    }


def keep_unless(good: Array, advance: Callable[[], Any], old: Any, platform: str) -> Any:
    """What `advance` returns, or where not `good` what there was.

    On CPU as a branch: XLA fuses no two results into one loop there, so that with a choice by element the new moments
    and the new parameters each read the old moments, which were copied. On a GPU a branch waits for the host.
    """
    if platform == "cpu":
        return lax.cond(good, advance, lambda: old)
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), advance(), old)


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A compiled update and all that goes with it: `state = step.init(seed)`, `state, metrics = step(state, batch)`.

    The state is donated: keep no reference to the one passed in. `metrics` are device scalars: read those of step N-1
    after dispatching step N.

    Attributes:
      objective, optimizer: what it is built of. mesh, rules: where it runs.
      abstract: shapes of the state. shardings: of the state. batch_shardings: of a batch.
    """

    objective: Objective
    optimizer: Optimizer
    mesh: Mesh
    rules: Rules
    abstract: TrainState
    shardings: TrainState
    batch_spec: Any
    batch_shardings: Any
    jitted: Any
    init_jitted: Callable[[int], Any]

    def init(self, seed: int = 0) -> TrainState:
        """Returns a fresh, sharded state: parameters of `seed`, optimizer state, step 0."""
        with self.context():
            return self.init_jitted(jax.random.key(seed, impl="threefry2x32"))

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        program = self.compiled
        try:
            with self.context():
                return program(state, batch)
        except TypeError:
            _refuse_other_shapes(batch, self.batch_spec)
            raise

    @functools.cached_property
    def compiled(self) -> Any:
        """The update as a program, compiled when first asked for. Other shapes are an error, never a second program."""
        program = self.lower().compile()
        return_freed_memory()
        return program

    def put(self, batch: Any) -> Any:
        """Places a host batch on the mesh."""
        return jax.tree.map(jax.device_put, batch, self.batch_shardings)

    def trace(self) -> Any:
        """Traces the update for its shapes and shardings, without data."""
        with self.context():
            return self.jitted.trace(self.abstract, self.batch_spec)

    def lower(self) -> Any:
        """Lowers the update for its shapes and shardings, without data: for ahead-of-time compilation."""
        with self.context():
            return self.trace().lower()

    @property
    def abstract_state(self) -> TrainState:
        """Shapes with shardings: what a checkpoint is restored to."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.abstract, self.shardings
        )

    @property
    def param_shardings(self) -> Any:
        """Shardings of all parameters, trained and frozen."""
        return join(self.shardings.params, self.shardings.frozen)

    def with_params(self, state: TrainState, params: Any) -> TrainState:
        """Returns a fresh state that starts from other parameters: also what the optimizer and the average copied."""
        trained, frozen = split(params, (*self.objective.frozen, *self.optimizer.frozen))
        with self.context():
            opt_state = jax.jit(self.optimizer.tx.init, out_shardings=self.shardings.opt_state)(trained)
        ema = None if state.ema is None else jax.tree.map(jnp.copy, trained)
        return dataclasses.replace(state, params=trained, frozen=frozen, opt_state=opt_state, ema=ema)

    @contextlib.contextmanager
    def context(self):
        """The mesh and the rules that constraints on activations inside the model refer to."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.rules):
            yield


def build_train_step(
    objective: Objective,
    optimizer: Optimizer | optax.GradientTransformation,
    batch_spec: Any,
    *,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    seed: int = 0,
    microbatches: int = 1,
    clip_norm: float = 1.0,
    ema: float = 0.0,
    active_microbatches: Callable[[Array], Array] | None = None,
) -> TrainStep:
    """Builds the update of an objective.

    Args:
      objective: the plug-in loss. optimizer: of `make_optimizer`, or any optax transformation.
      batch_spec: what the data delivers, usually `objective.batch_spec(batch_size, context_length)`.
      mesh: None is all devices along fsdp. rules: logical axis to mesh axis.
      seed: of masks, dropout and whatever else objectives draw. microbatches: same gradient, less memory.
      clip_norm: clipping of the gradient's global norm, 0 is off. ema: decay of averaged weights, 0 is off.
      active_microbatches: of a step, how many micro-batches hold rows, where the batch grows during the run.

    Returns:
      The TrainStep.

    Raises:
      UserError: rows that micro-batches or devices do not divide, parameters that the mesh does not divide.
    """
    if isinstance(optimizer, optax.GradientTransformation):
        optimizer = Optimizer(optimizer, lambda count: jnp.full((), jnp.nan))
    mesh = mesh or make_mesh()
    platform = mesh.devices.flat[0].platform
    _check_rows(batch_spec, mesh, microbatches)
    frozen = (*objective.frozen, *optimizer.frozen)
    row = jax.tree.map(lambda s: jnp.zeros((1, *s.shape[1:]), s.dtype), batch_spec)
    boxed = jax.eval_shape(lambda key: objective.init(key, row), jax.random.key(0))
    trained_at, frozen_at = split(param_shardings(boxed, mesh, rules), frozen)

    def init(key: Array) -> TrainState:
        trained, fixed = split(unbox(objective.init(key, row)), frozen)
        trained = lax.with_sharding_constraint(trained, trained_at)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=trained,
            frozen=lax.with_sharding_constraint(fixed, frozen_at),
            opt_state=optimizer.tx.init(trained),
            ema=jax.tree.map(jnp.copy, trained) if ema else None,
            skipped=jnp.zeros(2, jnp.int32),
        )

    def update(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        active = active_microbatches(state.step) if active_microbatches and microbatches > 1 else None
        loss, metrics, grads = gradients(
            objective,
            state.params,
            state.frozen,
            batch,
            step=state.step,
            seed=seed,
            microbatches=microbatches,
            active=active,
        )
        state, more = updated(state, loss, grads, optimizer, clip_norm=clip_norm, ema=ema, platform=platform)
        return state, metrics | more

    abstract = jax.eval_shape(init, jax.random.key(0))
    _check_dtypes(optimizer, abstract.params, abstract.opt_state)
    replicated = NamedSharding(mesh, PartitionSpec())
    placed = TrainState(
        step=replicated,
        params=trained_at,
        frozen=frozen_at,
        opt_state=state_shardings(abstract.opt_state, abstract.params, trained_at, mesh),
        ema=trained_at if ema else None,
        skipped=replicated,
    )
    placed_batch = batch_shardings(batch_spec, mesh)
    return TrainStep(
        objective=objective,
        optimizer=optimizer,
        mesh=mesh,
        rules=rules,
        abstract=abstract,
        shardings=placed,
        batch_spec=batch_spec,
        batch_shardings=placed_batch,
        jitted=jax.jit(
            update,
            in_shardings=(placed, placed_batch),
            out_shardings=(placed, replicated),
            donate_argnums=(0,),
            compiler_options=options_on("update", platform),
        ),
        init_jitted=jax.jit(init, out_shardings=placed, compiler_options=options_on("init", platform)),
    )


def _check_rows(batch_spec: Any, mesh: Mesh, microbatches: int) -> None:
    """Raises a UserError where micro-batches or devices do not divide a batch's rows."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch_spec):
        if microbatches < 1 or leaf.shape[0] % (microbatches * rows):
            raise UserError(
                f"the batch has {leaf.shape[0]} rows ({path_name(path)}), which microbatches={microbatches} "
                f"x {rows} devices (data x fsdp) do not divide."
            )


def _refuse_other_shapes(batch: Any, spec: Any) -> None:
    """Raises a UserError where a leaf of a batch is not what the step was built for."""
    given, wanted = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (batch, spec))
    for path in wanted | given:
        if path not in given or path not in wanted:
            raise UserError(f"the batch {'has' if path in given else 'lacks'} {path_name(path)}, unlike the step's.")
        is_, want = given[path], wanted[path]
        if (is_.shape, jax.dtypes.canonicalize_dtype(is_.dtype)) != (want.shape, want.dtype):
            raise UserError(
                f"{path_name(path)} of the batch is {is_.dtype}{list(is_.shape)}; "
                f"the step is built for {want.dtype}{list(want.shape)}."
            )


def _check_dtypes(optimizer: Optimizer, params: Any, opt_state: Any) -> None:
    """Raises a UserError where an optimizer changes the type of its state."""
    _, after = jax.eval_shape(optimizer.tx.update, params, opt_state, params)
    pairs = zip(jax.tree_util.tree_leaves_with_path(opt_state), jax.tree.leaves(after), strict=True)
    for (path, old), new in pairs:
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise UserError(
                f"the optimizer turns {path_name(path)} of its state from {old.dtype}{list(old.shape)} into "
                f"{new.dtype}{list(new.shape)}; an update must keep shapes and types."
            )
