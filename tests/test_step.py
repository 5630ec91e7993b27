"""The train step: what an update does to the state, whatever the objective, the micro-batches and the mesh."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close, assert_trees_equal, relative, text_batch, tiny
from toys import SIZE, Bigram

from gpt_jax.errors import UserError
from gpt_jax.eval_step import build_eval_step
from gpt_jax.model import Transformer
from gpt_jax.objectives.causal_lm import CausalLM
from gpt_jax.objectives.compose import Mixture, Sum
from gpt_jax.optim import make_optimizer, make_schedule
from gpt_jax.sharding import assert_sharded_like, make_mesh, path_name
from gpt_jax.step import build_train_step, gradients, keep_unless, row_keys


def batch_of(seed=0, rows=8, **kwargs):
    return text_batch(rows=rows, seed=seed, vocab=SIZE, **kwargs)


def build(objective=None, optimizer=None, rows=8, mesh=None, **kwargs):
    objective = objective or Bigram()
    return build_train_step(
        objective,
        optimizer or make_optimizer("adamw", 1e-2),
        objective.batch_spec(rows, 12),
        mesh=mesh or make_mesh(devices=jax.devices()[:1]),
        **kwargs,
    )


@functools.cache
def standard():
    """AdamW with an average of the weights, shared by tests that only look."""
    return build(ema=0.75)


def after(step, batches, seed=0):
    state, metrics = step.init(seed), None
    for batch in batches:
        state, metrics = step(state, step.put(batch))
    return state, jax.device_get(metrics)


def host(tree):
    return jax.tree.map(np.array, jax.device_get(tree))


# --- the gradient -----------------------------------------------------------------------------------------------------


def gradient_of(objective, batch, microbatches=1, params=None, active=None):
    """(loss, metrics, gradient) of one batch at step 3 under seed 0."""
    params = params or host(build(objective).init(0).all_params)
    frozen = jax.tree.map(lambda x: None, params)
    keys = dict(step=jnp.int32(3), seed=0, microbatches=microbatches)
    run = jax.jit(lambda p, b, active: gradients(objective, p, frozen, b, active=active, **keys))
    return host(run(params, batch, active))


def test_the_gradient_of_the_total_is_the_weighted_sum_of_the_terms_gradients():
    batch = batch_of()
    both = gradient_of(Bigram({"lm": 2.0, "some": lambda step: 0.1 * step}), batch)
    lm, some = (gradient_of(Bigram(c), batch) for c in ({"lm": 1.0, "some": 0}, {"lm": 0, "some": 1.0}))
    expected = jax.tree.map(lambda a, b: 2.0 * a + 0.3 * b, lm[2], some[2])
    assert relative(both[2], expected) < 1e-6
    assert relative(lm[2], some[2]) > 0.01
    assert float(both[0]) == pytest.approx(2.0 * float(lm[0]) + 0.3 * float(some[0]), rel=1e-6)


def test_a_coefficient_of_zero_leaves_the_other_terms_bit_identical():
    batch = batch_of()
    with_it, without = (gradient_of(Bigram({"lm": 1.0, "some": c}), batch) for c in (0.5, 0.0))
    assert with_it[1]["loss/lm"] == without[1]["loss/lm"]
    assert without[0] == without[1]["loss/lm"]
    alone = gradient_of(Bigram({"lm": 1.0, "some": lambda step: 0.0 * step}), batch)  # a 0 that is not a constant
    assert alone[1]["loss/lm"] == without[1]["loss/lm"]
    assert_trees_close(alone[2], without[2], rtol=1e-6, atol=1e-9)


def test_a_coefficient_of_zero_leaves_its_term_out_of_the_program():
    def flops(coefs):
        objective = Sum({"a": Bigram(), "b": Bigram()}, coefs)
        lowered = build(objective).lower()
        return lowered.compile().cost_analysis()["flops"], gradient_of(objective, batch_of())[1]

    (both, _), (one, metrics) = flops({}), flops({"b": 0.0})
    assert "loss/a/lm" in metrics and "loss/b/lm" not in metrics
    assert one < 0.8 * both  # what stays of b is its metric: a forward pass


def mean_of_means(objective, batch, pieces, params):
    """The mistake: each micro-batch divided by its own weight, then averaged."""
    keys = row_keys(0, 3, jnp.arange(8))
    prepared = objective.prepare(batch, keys, 3)

    def loss(params, j):
        piece = jax.tree.map(lambda x: x[j::pieces], prepared)
        sums, _ = objective.loss(params, piece, keys[j::pieces], True)
        return sum(c * sums[k] / jnp.sum(piece["weights"][k]) for k, c in objective.coefs.items())

    grads = [jax.grad(loss)(params, j) for j in range(pieces)]
    return host(jax.tree.map(lambda *g: sum(g) / pieces, *grads))


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_micro_batches_give_the_full_batchs_gradient_with_uneven_tokens_and_dropout(pieces):
    objective, batch = Bigram(), batch_of()
    params = host(build(objective).init(0).all_params)
    whole, cut = (gradient_of(objective, batch, n, params) for n in (1, pieces))
    assert float(cut[0]) == pytest.approx(float(whole[0]), rel=1e-6)
    for name in whole[1]:
        assert float(cut[1][name]) == pytest.approx(float(whole[1][name]), rel=1e-6), name
    assert relative(cut[2], whole[2]) < 1e-6
    assert relative(mean_of_means(objective, batch, pieces, params), whole[2]) > 0.01


@pytest.mark.parametrize("reweight", ["none", "perplexity"])
def test_micro_batches_of_a_transformer_with_dropout_give_the_full_batchs_gradient(reweight):
    objective = CausalLM(Transformer(tiny(dropout=0.2, num_layers=1)), reweight=reweight)
    batch = text_batch(documents=True)
    whole, cut = (gradient_of(objective, batch, n) for n in (1, 4))
    assert relative(cut[2], whole[2]) < 2e-6
    assert float(cut[0]) == pytest.approx(float(whole[0]), rel=1e-6)


def test_a_term_without_weight_contributes_nothing_and_no_nan():
    batch = batch_of()
    batch["target_weights"][:] = 0
    loss, metrics, grads = gradient_of(Bigram(), batch)
    assert loss == 0 and all(value == 0 for value in metrics.values())
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


@dataclasses.dataclass(frozen=True)
class Balanced(Bigram):
    """With a term that is no sum over rows: the variance of the batch's mean logit."""

    batch_terms = frozenset({"balance"})

    def loss(self, params, batch, keys, train):
        sums, metrics = super().loss(params, batch, keys, train)
        logits = params["model"]["table"][batch["tokens"]] @ params["model"]["out"]
        return sums | {"balance": jnp.var(logits.mean((0, 1)))}, metrics


@pytest.mark.parametrize("active", [None, 1, 2])
def test_terms_that_are_no_sums_over_rows_are_averaged_over_the_micro_batches_that_ran(active):
    objective = Balanced({"lm": 1.0, "some": 0.0, "balance": 3.0})
    params = host(build(objective).init(0).all_params)
    batch = batch_of()
    loss, metrics, _ = gradient_of(objective, batch, 4, params, active)
    logits = params["model"]["table"][batch["tokens"]] @ params["model"]["out"]
    expected = np.mean([np.var(logits[j::4].mean((0, 1))) for j in range(active or 4)])
    assert float(metrics["loss/balance"]) == pytest.approx(expected, rel=1e-5)
    assert float(loss) == pytest.approx(float(metrics["loss/lm"]) + 3 * expected, rel=1e-6)


def test_row_keys_belong_to_seed_step_and_row():
    keys = jax.random.key_data(row_keys(0, 5, jnp.arange(4)))
    expected = [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 5), row) for row in range(4)]
    assert (keys == jax.random.key_data(jnp.stack(expected))).all()
    others = [row_keys(1, 5, jnp.arange(4)), row_keys(0, 6, jnp.arange(4)), row_keys(0, 5, 4 + jnp.arange(4))]
    everything = np.concatenate([keys, *map(jax.random.key_data, others)])
    assert len({tuple(k) for k in everything.tolist()}) == 16
    with jax.default_prng_impl("rbg"):  # vmap over rbg keys is not the loop over keys: threefry whatever the default
        assert (jax.random.key_data(row_keys(0, 5, jnp.arange(4))) == keys).all()


# --- one update -------------------------------------------------------------------------------------------------------


def test_two_runs_of_a_seed_are_the_same_bits_and_another_seed_is_not():
    batches = [batch_of(seed=s) for s in range(3)]
    (a, one), (b, two) = (after(build(), batches) for _ in range(2))
    assert_trees_equal(host(a), host(b))
    assert one == two
    c, _ = after(build(seed=1), batches)  # other draws from the same initial parameters
    assert relative(host(c.params), host(a.params)) > 1e-4
    d, _ = after(standard(), batches, seed=1)
    assert relative(host(d.params), host(a.params)) > 1e-2


def test_updates_are_the_optimizers_on_the_clipped_gradient():
    batch = batch_of()
    for clip in (0.0, 0.05, 100.0):
        step = build(optimizer=optax.sgd(0.5), clip_norm=clip)
        start = host(step.init(0).params)
        _, _, grads = gradient_of_at_zero(batch, start)
        norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads)))
        scale = min(1.0, clip / norm) if clip else 1.0
        state, metrics = after(step, [batch])
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)  # as it was before clipping
        expected = jax.tree.map(lambda p, g, scale=scale: p - 0.5 * scale * g, start, grads)
        assert_trees_close(host(state.params), expected, rtol=1e-5, atol=1e-7)
        assert int(state.step) == 1


def gradient_of_at_zero(batch, params):
    frozen = jax.tree.map(lambda x: None, params)
    return host(gradients(Bigram(), params, frozen, batch, step=jnp.int32(0), seed=0, microbatches=1))


def test_the_average_of_the_weights_has_its_closed_form_and_is_what_evaluation_reads():
    step = standard()
    state = step.init(0)
    weights = [host(state.params)["model"]["table"].astype(np.float64)]
    for seed in range(4):
        state, _ = step(state, step.put(batch_of(seed)))
        weights.append(host(state.params)["model"]["table"].astype(np.float64))
    closed = 0.75**4 * weights[0] + sum(0.25 * 0.75 ** (4 - t) * weights[t] for t in range(1, 5))
    np.testing.assert_allclose(state.eval_params()["model"]["table"], closed, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(state.eval_params("ema")["model"]["table"], state.ema["model"]["table"])
    np.testing.assert_array_equal(state.eval_params("raw")["model"]["table"], state.params["model"]["table"])
    with pytest.raises(UserError, match="eval.weights is 'average', but the optimizer keeps none"):
        state.eval_params("average")
    with pytest.raises(UserError, match=r"eval.weights is 'ema', but optimizer\.ema is 0"):
        build().init(0).eval_params("ema")


def schedule_free(learning_rate):
    return optax.contrib.schedule_free(optax.sgd(learning_rate), learning_rate=learning_rate, b1=0.8)


def test_a_schedule_free_optimizer_is_evaluated_at_its_average():
    step = build(optimizer=make_optimizer(f"{__name__}:schedule_free", 0.1), clip_norm=0.0)
    state = step.init(0)
    z = x = host(state.params)["model"]["table"].astype(np.float64)
    for t in range(1, 4):
        y = host(state.params)
        np.testing.assert_allclose(y["model"]["table"], 0.2 * z + 0.8 * x, rtol=1e-4, atol=1e-6)
        frozen = jax.tree.map(lambda leaf: None, y)
        _, _, grads = gradients(Bigram(), y, frozen, batch_of(t), step=jnp.int32(t - 1), seed=0, microbatches=1)
        z = z - 0.1 * np.asarray(grads["model"]["table"])
        x = (1 - 1 / t) * x + z / t
        state, _ = step(state, step.put(batch_of(t)))
    np.testing.assert_allclose(state.eval_params()["model"]["table"], x, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(state.eval_params("raw")["model"]["table"], state.params["model"]["table"])


def test_a_run_that_starts_from_other_weights_starts_its_averages_from_them_too():
    other = host(standard().init(5).all_params)
    for step in (standard(), build(optimizer=make_optimizer(f"{__name__}:schedule_free", 0.1))):
        state = step.with_params(step.init(0), jax.tree.map(jnp.asarray, other))
        assert_trees_close(host(state.eval_params()), other, rtol=1e-6, atol=1e-6)
        state, _ = step(state, step.put(batch_of()))
        assert relative(host(state.eval_params()), other) < 0.2  # and does not jump back


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_update_is_skipped_and_counted_and_the_step_goes_on(bad):
    schedule = make_schedule("linear", peak=1.0, steps=10, warmup="0", end_factor=0.0)
    step = build(optimizer=make_optimizer("adamw", schedule), ema=0.75)
    broken = batch_of(1)
    broken["target_weights"][0, 0] = bad
    state, _ = after(step, [batch_of(0)])
    before = host(state)
    seen = []
    for batch in (broken, broken, batch_of(2), broken):
        state, metrics = step(state, step.put(batch))
        if len(seen) < 2:
            for field in ("params", "opt_state", "ema"):
                assert_trees_equal(host(getattr(state, field)), getattr(before, field))
        seen.append((int(state.step), float(metrics["skipped_in_a_row"]), float(metrics["skipped"])))
    assert seen == [(2, 1, 1), (3, 2, 2), (4, 0, 2), (5, 1, 3)]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(host(state.params)))
    # The schedule follows the updates that were made, as the optimizer's own count does: this is the third.
    assert float(metrics["lr"]) == pytest.approx(0.8)


def test_the_logged_rate_is_the_one_the_optimizer_used():
    schedule = make_schedule("linear", peak=0.5, steps=10, warmup="2", end_factor=0.0)
    step = build(optimizer=make_optimizer("optax:sgd", schedule), clip_norm=0.0)
    state = step.init(0)
    for turn in range(4):
        before = host(state.params)
        frozen = jax.tree.map(lambda leaf: None, before)
        _, _, grads = gradients(Bigram(), before, frozen, batch_of(turn), step=jnp.int32(turn), seed=0, microbatches=1)
        state, metrics = step(state, step.put(batch_of(turn)))
        moved = jax.tree.map(lambda a, b, g, lr=float(metrics["lr"]): a - b + lr * g, host(state.params), before, grads)
        assert max(np.abs(x).max() for x in jax.tree.leaves(moved)) < 1e-6


def test_frozen_parameters_keep_their_bits_and_have_no_gradient_moments_decay_or_average():
    @dataclasses.dataclass(frozen=True)
    class Fixed(Bigram):
        frozen = (r"model/table",)

    step = build(Fixed(), make_optimizer("adamw", 0.1, weight_decay=0.5), ema=0.5)
    start = host(step.init(0).all_params)
    state, _ = after(step, [batch_of(s) for s in range(3)])
    assert_trees_equal(host(state.all_params["model"]["table"]), start["model"]["table"])
    assert relative(host(state.all_params["model"]["out"]), start["model"]["out"]) > 0.01
    assert state.params["model"]["table"] is None and state.frozen["model"]["out"] is None
    names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path((state.opt_state, state.ema))]
    assert any("out" in name for name in names) and not any("table" in name for name in names)
    assert jax.tree.structure(state.eval_params()) == jax.tree.structure(start)
    by_group = build(optimizer=make_optimizer("adamw", 0.1, groups=((r"model/out", {"frozen": True}),)))
    start, state = host(by_group.init(0).all_params), after(by_group, [batch_of()])[0]
    assert_trees_equal(host(state.all_params["model"]["out"]), start["model"]["out"])


def test_one_compilation_serves_a_run_of_mixed_tasks():
    objective = Mixture({"a": Bigram(), "b": Bigram(rate=0.0)}, row_counts={"a": 4, "b": 4})
    step = build(objective)
    state = step.init(0)
    for turn in range(4):  # one task's targets run out, then the other's
        batch = {name: batch_of(turn, rows=4) for name in "ab"}
        if turn > 1:
            batch["ab"[turn % 2]]["target_weights"][:] = 0
        state, metrics = step(state, step.put(batch))
    assert float(metrics["loss/b/lm"]) == 0 and float(metrics["loss/a/lm"]) > 0
    more = {name: batch_of(0, rows=8) for name in "ab"}
    with pytest.raises(UserError, match=r"a/\w+ of the batch is \w+\[8, \d+\]; the step is built for \w+\[4, \d+\]"):
        step(state, more)
    batch["a"]["tokens"] = batch["a"]["tokens"].astype(np.uint16)
    with pytest.raises(UserError, match=r"a/tokens of the batch is uint16\[4"):
        step(state, batch)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("good", [True, False])
def test_a_bad_update_leaves_everything_as_it_was(platform, good):
    old = {"x": jnp.arange(3.0), "n": jnp.int32(4)}
    new = {"x": jnp.full(3, 7.0 if good else jnp.nan), "n": jnp.int32(5)}
    kept = jax.jit(lambda good: keep_unless(good, lambda: new, old, platform))(jnp.bool_(good))
    assert_trees_equal(kept, new if good else old)


def test_on_cpu_moments_are_updated_where_they_lie():
    n = 1 << 18

    def memory(platform):
        def update(state, g):
            good = jnp.isfinite(jnp.sum(g))

            def advance():
                p, m, v = state
                m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
                return p - m / (jnp.sqrt(v) + 1e-8), m, v

            return keep_unless(good, advance, state, platform)

        x = jax.ShapeDtypeStruct((n,), jnp.float32)
        program = jax.jit(update, donate_argnums=0).lower((x, x, x), x).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert memory("cpu") < 4 * n < memory("tpu")  # the second, compiled for this CPU, copies both moments


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_memory_that_is_free_in_pieces_goes_back():
    code = """if True:
    from gpt_jax.memory import return_freed_memory

    def resident():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1e3

    pieces = [bytes(60_000) for _ in range(4000)]  # 240 MB
    kept = pieces[::400]
    del pieces
    before = resident()
    return_freed_memory()
    print(before - resident())
    """
    tunables = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"  # those of scripts/_venv.sh
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"GLIBC_TUNABLES": tunables}, capture_output=True, text=True
    )
    assert float(done.stdout) > 100, done.stderr


def test_an_optimizer_that_changes_the_type_of_its_state_is_refused():
    def update(grads, state, params=None):
        return grads, state.astype(jnp.float32)

    half = optax.GradientTransformation(lambda params: jnp.zeros(2, jnp.bfloat16), update)
    with pytest.raises(UserError, match=r"from bfloat16\[2\] into float32\[2\]; an update must keep"):
        build(optimizer=half)


def test_an_update_can_be_lowered_without_data():
    text = standard().lower().as_text()
    assert "stablehlo.dot_general" in text and "tf.aliasing_output" in text  # the old state's buffers are reused


# --- meshes -----------------------------------------------------------------------------------------------------------

MESHES = {
    "fsdp_8": (dict(fsdp=8), {}),
    "data_2_fsdp_4": (dict(data=2, fsdp=4), {}),
    "tensor_4_data_2": (dict(data=2, fsdp=1, tensor=4), {}),
    "fsdp_2_tensor_2_sequence_2": (dict(fsdp=2, tensor=2, sequence=2), dict(flatten=False)),
    "fsdp_2_tensor_2_two_micro_batches": (dict(data=2, fsdp=2, tensor=2), dict(microbatches=2)),
}


def recorder():
    """An optimizer that moves nothing and keeps the gradient as its state: sharded like a moment."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(zeros, lambda updates, state, params=None: (zeros(updates), updates))


@functools.cache
def recorded(name, reweight="none"):
    sizes, options = MESHES.get(name, (dict(fsdp=1), {}))
    mesh = make_mesh(sizes, devices=jax.devices()[: 1 if name == "one" else 8])
    model = Transformer(tiny(pattern=("band",), window=4, dropout=0.1, flatten=options.get("flatten", True)))
    objective = CausalLM(model, reweight=reweight, z_loss=1e-3)
    batch = text_batch(documents=True)
    spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
    step = build_train_step(
        objective, recorder(), spec, mesh=mesh, clip_norm=0.0, microbatches=options.get("microbatches", 1)
    )
    state, metrics = step(step.init(0), step.put(batch))
    return step, state, host(metrics)


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_loss_and_gradient_of_one_device(name):
    _, one, expected = recorded("one")
    step, many, metrics = recorded(name)
    assert_trees_equal(host(many.params), host(one.params))  # the same initial parameters, whatever the mesh
    for key in ("loss", "nll", "grad_norm"):
        assert float(metrics[key]) == pytest.approx(float(expected[key]), rel=1e-5), key
    assert relative(host(many.opt_state), host(one.opt_state)) < 1e-5
    kernel = many.params["model"]["layers"]["block_0"]["mlp"]["up"]["kernel"]
    ways = step.mesh.shape["fsdp"] * step.mesh.shape["tensor"]
    assert np.prod(kernel.sharding.shard_shape(kernel.shape)) == kernel.size // ways
    assert_sharded_like(many.opt_state, many.params)


def test_weights_of_samples_do_not_depend_on_the_number_of_devices():
    (_, one, expected), (_, many, metrics) = recorded("one", "perplexity"), recorded("fsdp_8", "perplexity")
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
    assert float(metrics["loss"]) > 1.0001 * float(metrics["nll"])
    assert relative(host(many.opt_state), host(one.opt_state)) < 1e-5


def test_constraints_on_activations_inside_the_model_reach_the_compiler():
    step, _, _ = recorded("fsdp_2_tensor_2_sequence_2")
    assert '[{"data", "fsdp"}, {"sequence"}, {}]' in step.lower().as_text()


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", f"{__name__}:schedule_free", "optax:lion"])
def test_optimizer_state_is_placed_like_its_parameters_after_init_and_after_an_update(name):
    objective = CausalLM(Transformer(tiny(num_layers=1)))
    step = build(objective, make_optimizer(name, 1e-3), mesh=make_mesh(fsdp=4, tensor=2))
    state = step.init(0)
    assert_sharded_like(state.opt_state, state.params)
    start = host(state.params)
    state, metrics = step(state, step.put(text_batch()))
    assert_sharded_like(state.opt_state, state.params)
    assert np.isfinite(float(metrics["loss"])) and float(metrics["skipped"]) == 0
    assert relative(host(state.params), start) > 1e-5
    if name != "adafactor":  # whose factors are small and replicated
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim > 1]
        assert moments and all(np.prod(m.sharding.shard_shape(m.shape)) < m.size for m in moments if m.size > 500)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_draws_by_the_examples_index_so_batches_of_any_size_add_up():
    step = standard()
    params = step.init(0).eval_params()
    small = build_eval_step(step, step.batch_spec)
    wide = build_eval_step(step, Bigram().batch_spec(16, 12))
    first, second = batch_of(0), batch_of(1)
    joined = {k: np.concatenate([first[k], second[k]]) for k in first}
    parts = [small(params, step.put(first), 0), small(params, step.put(second), 8)]
    whole = host(wide(params, jax.tree.map(jnp.asarray, joined), 0))
    assert set(whole) == {"loss/lm", "loss/some", "nll"}
    for name, pair in whole.items():
        total = np.sum([np.array(host(part)[name]) for part in parts], axis=0)
        np.testing.assert_allclose(total, pair, rtol=1e-6)
    assert host(small(params, step.put(second), 8)) == host(parts[1])  # the same masks every time
    assert host(small(params, step.put(second), 0))["loss/some"] != host(parts[1])["loss/some"]


def test_evaluation_counts_a_term_that_is_no_sum_over_rows_once_for_each_batch():
    class Counted(Balanced):
        def prepare(self, batch, keys, step):
            prepared = super().prepare(batch, keys, step)
            weights = prepared["weights"] | {"balance": prepared["target_weights"]}
            return {**prepared, "weights": weights}

    for kind in (Balanced, Counted):  # whether or not it sets weights that nothing divides by
        step = build(kind({"lm": 1.0, "some": 0.0, "balance": 3.0}))
        value, weight = build_eval_step(step, step.batch_spec)(step.init(0).eval_params(), step.put(batch_of()), 0)[
            "loss/balance"
        ]
        assert float(weight) == 1 and float(value) > 0


def test_evaluation_drops_nothing_and_its_padding_weighs_nothing():
    step = standard()
    params, batch = step.init(0).eval_params(), batch_of()
    batch["target_weights"][5:] = 0
    nll = host(build_eval_step(step, step.batch_spec)(params, step.put(batch), 0)["nll"])
    logits = host(params["model"]["table"])[batch["tokens"]] @ host(params["model"]["out"])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    by_hand = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0] * batch["target_weights"]
    np.testing.assert_allclose(nll, [by_hand.sum(), batch["target_weights"].sum()], rtol=1e-5)


# --- a growing batch, and mistakes ------------------------------------------------------------------------------------


def test_a_growing_batch_stops_after_its_micro_batches():
    """Four rows in the first two of four micro-batches, the rest junk of weight 0: as a batch of four rows."""
    batch = batch_of()
    place = np.array([0, 1, 4, 5])  # micro-batch j has rows j, j + 4
    padded = {k: np.zeros_like(v) for k, v in batch.items()}
    for k in batch:
        padded[k][place] = batch[k][place]
    growing = dict(microbatches=4, active_microbatches=lambda s: jnp.where(s < 1, 2, 4))
    step, plain = build(Bigram(rate=0.0), **growing), build(Bigram(rate=0.0), microbatches=4)
    (a, grown), (b, direct) = (after(s, [padded]) for s in (step, plain))
    assert float(grown["loss"]) == pytest.approx(float(direct["loss"]), rel=1e-6)
    assert relative(host(a.params), host(b.params)) < 1e-5
    padded["target_weights"][2:4] = 1  # beyond the active ones: counted in the weight, but never processed
    assert float(after(step, [padded])[1]["nll"]) == pytest.approx(float(grown["nll"]), rel=1e-6)


def test_rows_that_devices_or_micro_batches_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"12 rows \(.*\), which microbatches=1 x 8 devices"):
        build(rows=12, mesh=make_mesh())
    with pytest.raises(UserError, match="8 rows .* microbatches=3 x 1 devices"):
        build(microbatches=3)
    with pytest.raises(UserError, match="microbatches=0"):
        build(microbatches=0)


def test_terms_without_coefficient_loss_or_weights_are_named():
    with pytest.raises(UserError, match=r"a coefficient for 'sum' \(did you mean 'some'\?\), but its loss has only"):
        after(build(Bigram({"lm": 1.0, "some": 1.0, "sum": 1.0})), [batch_of()])
    with pytest.raises(UserError, match="a term 'some' without a coefficient"):
        after(build(Bigram({"lm": 1.0})), [batch_of()])

    class Unweighted(Bigram):
        def prepare(self, batch, keys, step):
            prepared = super().prepare(batch, keys, step)
            return {**prepared, "weights": {"some": prepared["weights"]["some"]}}

        def loss(self, params, batch, keys, train):
            sums, metrics = super().loss(params, {**batch, "weights": batch["weights"] | {"lm": 1.0}}, keys, train)
            return sums, metrics

    with pytest.raises(UserError, match="prepare sets no weights for its term 'lm'"):
        after(build(Unweighted()), [batch_of()])
