"""The train step: accumulation, meshes, frozen parameters, skipped updates, averages, schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import text_batch, tiny

from gpt_jax.errors import UserError
from gpt_jax.model import Transformer
from gpt_jax.objectives.causal_lm import CausalLM
from gpt_jax.objectives.compose import Sum
from gpt_jax.optim import make_optimizer, make_schedule
from gpt_jax.sharding import assert_sharded_like, make_mesh, path_name
from gpt_jax.step import build_eval_step, build_train_step

MODEL = Transformer(tiny())


def build(objective=None, optimizer=None, devices=1, rows=8, mesh=None, **kwargs):
    objective = objective or CausalLM(MODEL)
    mesh = mesh or make_mesh(devices=jax.devices()[:devices])
    optimizer = optimizer or make_optimizer("adamw", 1e-2)
    return build_train_step(objective, optimizer, objective.batch_spec(rows, 12), mesh=mesh, **kwargs)


def run(step, steps=3, seed=0, batch=None):
    state, history = step.init(seed), []
    for turn in range(steps):
        state, metrics = step(state, step.put(batch or text_batch(seed=turn)))
        history.append(float(metrics["loss"]))
    return state, history


def close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance)


def test_golden_metrics_of_one_step():
    """Pinned: a change of initialisation, loss, gradient or keys shows here."""
    _, metrics = (lambda step: step(step.init(0), step.put(text_batch())))(build())
    assert float(metrics["loss"]) == pytest.approx(float(metrics["nll"]), rel=1e-6)
    assert float(metrics["loss"]) == pytest.approx(np.log(37), abs=0.05)
    assert set(metrics) == {"loss", "loss/lm", "nll", "grad_norm", "lr", "skipped", "skipped_in_a_row"}
    assert float(metrics["lr"]) == pytest.approx(1e-2)


def test_two_runs_of_a_seed_are_bitwise_the_same_and_another_seed_differs():
    (a, losses), (b, again), (_, other) = run(build()), run(build()), run(build(), seed=1)
    assert losses == again and losses != other
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("pieces", [2, 8])
def test_micro_batches_train_as_the_whole_batch_with_uneven_tokens_and_dropout(pieces):
    objective = CausalLM(Transformer(tiny(dropout=0.3)))
    optimizer = optax.sgd(0.5)
    (whole, losses), (cut, again) = (
        run(build(objective, optimizer)),
        run(build(objective, optimizer, microbatches=pieces)),
    )
    np.testing.assert_allclose(losses, again, rtol=2e-6)
    close(whole.params, cut.params, 2e-6)


MESHES = [
    dict(fsdp=8),
    dict(data=2, fsdp=4),
    dict(data=2, fsdp=1, tensor=4),
    dict(fsdp=2, tensor=2, sequence=2),
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_trains_as_one_device(sizes):
    config = tiny(flatten=sizes.get("sequence", 1) == 1)
    objective = CausalLM(Transformer(config))
    mesh = make_mesh(dict(data=1, fsdp=1, tensor=1, sequence=1) | sizes)
    optimizer = optax.sgd(0.5)
    one, losses = run(build(objective, optimizer))
    many, again = run(build(objective, optimizer, mesh=mesh))
    np.testing.assert_allclose(losses, again, rtol=1e-5)
    close(one.params, many.params, 1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "optax:lion"])
def test_optimizer_state_is_sharded_like_its_parameters(name):
    step = build(optimizer=make_optimizer(name, 1e-3), devices=8)
    state, losses = run(step)
    assert_sharded_like(state.opt_state, state.params)
    kernel = state.params["model"]["layers"]["block_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // 8
    assert np.isfinite(losses).all()


def test_frozen_parameters_are_bitwise_kept_and_have_no_moments():
    optimizer = make_optimizer("adamw", 1e-1, groups=((r".*embedding", {"frozen": True}),))
    step = build(optimizer=optimizer)
    before = jax.device_get(step.init(0).frozen["model"]["embedding"])
    state, _ = run(step)
    np.testing.assert_array_equal(before, state.all_params["model"]["embedding"])
    assert state.params["model"]["embedding"] is None
    names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)]
    assert names and not any("embedding" in name for name in names)


def test_a_non_finite_update_is_skipped_and_counted_and_the_run_goes_on():
    step = build(ema=0.9)
    state, _ = run(step, 1)
    before = jax.device_get((state.params, state.opt_state, state.ema))
    bad = text_batch(seed=1)
    bad["target_weights"] = bad["target_weights"] * np.float32(np.nan)
    state, metrics = step(state, step.put(bad))
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves((state.params, state.opt_state, state.ema)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert int(state.step) == 2 and float(metrics["skipped"]) == 1 and float(metrics["skipped_in_a_row"]) == 1
    state, metrics = step(state, step.put(text_batch(seed=2)))
    assert float(metrics["skipped"]) == 1 and float(metrics["skipped_in_a_row"]) == 0


def test_the_average_of_weights_follows_its_closed_form():
    step = build(ema=0.75)
    state = step.init(0)
    expected = np.asarray(state.params["model"]["embedding"], np.float64)
    for turn in range(3):
        state, _ = step(state, step.put(text_batch(seed=turn)))
        expected = 0.75 * expected + 0.25 * np.asarray(state.params["model"]["embedding"], np.float64)
    np.testing.assert_allclose(state.eval_params()["model"]["embedding"], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(state.eval_params("raw")["model"]["embedding"], state.params["model"]["embedding"])


def test_the_gradient_is_clipped_to_its_norm():
    free, clipped = (build(optimizer=optax.sgd(1.0), clip_norm=c) for c in (0.0, 0.01))
    moved = []
    for step in (free, clipped):
        start = jax.device_get(step.init(0).params)
        state, metrics = step(step.init(0), step.put(text_batch()))
        change = jax.tree.map(lambda a, b: np.asarray(a) - b, jax.device_get(state.params), start)
        moved.append(float(np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in jax.tree.leaves(change)))))
    assert moved[0] == pytest.approx(float(metrics["grad_norm"]), rel=1e-3)
    assert moved[1] == pytest.approx(0.01, rel=1e-2)


def test_a_term_with_coefficient_zero_has_no_gradient_and_the_total_is_the_weighted_sum():
    pair = {"a": CausalLM(MODEL), "b": CausalLM(MODEL, label_smoothing=0.5)}
    _, metrics = (lambda s: s(s.init(0), s.put(text_batch())))(build(Sum(pair, {"a": 2.0, "b": 0.5})))
    assert float(metrics["loss"]) == pytest.approx(
        2 * float(metrics["loss/a/lm"]) + 0.5 * float(metrics["loss/b/lm"]), rel=1e-6
    )
    alone, _ = run(build(CausalLM(MODEL), optax.sgd(1.0)), 1)
    both, _ = run(build(Sum(pair, {"b": 0.0}), optax.sgd(1.0)), 1)
    close(alone.params, both.params, 1e-6)


def test_evaluation_sums_exactly_over_batches_and_is_the_same_every_time():
    step = build(CausalLM(Transformer(tiny(dropout=0.5))))
    evaluate = build_eval_step(step, step.batch_spec)
    params = step.init(0).eval_params()
    first, second = text_batch(seed=0), text_batch(seed=1)
    total = np.zeros(2)
    for batch in (first, second):
        total += np.asarray(jax.device_get(evaluate(params, step.put(batch), 0)["nll"]))
    joined = {k: np.concatenate([first[k], second[k]]) for k in first}
    wide = build(CausalLM(Transformer(tiny(dropout=0.5))), rows=16)
    whole = np.asarray(jax.device_get(build_eval_step(wide, wide.batch_spec)(params, wide.put(joined), 0)["nll"]))
    np.testing.assert_allclose(total, whole, rtol=1e-6)


def test_a_growing_batch_stops_after_its_micro_batches():
    """Four rows in the first two of four micro-batches, the rest junk of weight 0: as a batch of four rows."""
    batch = text_batch()
    place = np.array([0, 4, 1, 5])  # micro-batch j has rows j, j + 4
    small = {k: v[place] for k, v in batch.items()}
    padded = {k: np.zeros_like(v) for k, v in batch.items()}
    for k in batch:
        padded[k][place] = small[k]
    step = build(optimizer=optax.sgd(0.5), microbatches=4, active_microbatches=lambda s: jnp.where(s < 1, 2, 4))
    plain = build(optimizer=optax.sgd(0.5), rows=4)
    (a, grown), (b, direct) = (s(s.init(0), s.put(x)) for s, x in ((step, padded), (plain, small)))
    assert float(grown["loss"]) == pytest.approx(float(direct["loss"]), rel=1e-5)
    close(a.params, b.params, 1e-5)


def test_rows_that_devices_or_micro_batches_do_not_divide_are_refused():
    with pytest.raises(UserError, match="12 rows .* microbatches=1 x 8 devices"):
        build(devices=8, rows=12)
    with pytest.raises(UserError, match="microbatches=3"):
        build(microbatches=3)


def test_schedules_follow_their_formulas():
    peak, steps = 2.0, 100
    cosine = make_schedule("cosine", peak=peak, steps=steps, warmup="10", decay="80", end_factor=0.1)
    assert float(cosine(0)) == pytest.approx(peak / 10) and float(cosine(9)) == pytest.approx(peak)
    middle = 0.2 + 1.8 * 0.5 * (1 + np.cos(np.pi * (45 - 10) / 70))
    assert float(cosine(45)) == pytest.approx(middle) and float(cosine(95)) == pytest.approx(0.2)
    linear = make_schedule("linear", peak=peak, steps=steps, warmup="0", end_factor=0.0)
    assert float(linear(25)) == pytest.approx(1.5)
    wsd = make_schedule("wsd", peak=peak, steps=steps, warmup="0", cooldown="20%", end_factor=0.0)
    assert float(wsd(79)) == pytest.approx(peak) and float(wsd(90)) == pytest.approx(1.0)
    tokens = make_schedule(
        "linear", peak=peak, steps=steps, warmup="0", decay="1Ktok", end_factor=0.0, tokens_at=lambda s: s * 10
    )
    assert float(tokens(50)) == pytest.approx(1.0) and float(tokens(200)) == pytest.approx(0.0)
    with pytest.raises(UserError, match="optimizer.warmup is 'soon'"):
        make_schedule(peak=1.0, steps=10, warmup="soon")


def test_weight_decay_skips_biases_norms_and_positions_and_groups_scale_the_rate():
    groups = ((r".*mlp/up/kernel", {"lr": 0.0}), (r".*attention/.*", {"weight_decay": 0.0}))
    tx = make_optimizer("adamw", 1.0, weight_decay=0.5, groups=groups).tx
    params = build().init(0).params
    params = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    seen = {path_name(p): float(u.ravel()[0]) for p, u in jax.tree_util.tree_leaves_with_path(updates)}
    decayed = {name for name, value in seen.items() if value == pytest.approx(-0.5)}
    assert decayed == {"model/embedding", "model/layers/block_0/mlp/down/kernel"}
    assert all(value == 0 for name, value in seen.items() if name not in decayed)
