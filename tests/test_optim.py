"""Schedules and optimizers against their closed forms; stacked layers against the same layers alone."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt_jax.errors import UserError
from gpt_jax.optim import check_groups, make_optimizer, make_schedule, parse_length
from gpt_jax.train_state import split


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("200", ("steps", 200)),
        ("1e3", ("steps", 1000)),
        ("5%", ("steps", 50)),
        ("2.5 %", ("steps", 25)),
        ("375Mtok", ("tokens", 375e6)),
        ("2.6e2Btok", ("tokens", 260e9)),
        ("64tok", ("tokens", 64)),
        ("1Ttok", ("tokens", 1e12)),
    ],
)
def test_lengths_are_steps_tokens_or_parts_of_the_run(text, expected):
    assert parse_length(text, 1000, "optimizer.warmup") == expected


@pytest.mark.parametrize("text", ["", "ten", "5 epochs", "-3", "1.2.3", ".", "10Gtok"])
def test_other_lengths_are_refused_in_one_line(text):
    with pytest.raises(UserError, match=r"optimizer\.warmup is .*; write steps \('200'\)") as error:
        parse_length(text, 1000, "optimizer.warmup")
    assert repr(text) in str(error.value)


def closed_form(name, t, *, peak, warmup, decay, cooldown, end):
    """The learning rate at position t (steps or tokens), the warmup counted from the end of each step."""
    if name == "constant":
        return peak
    if name == "wsd":
        part = min(max((t - (decay - cooldown)) / cooldown, 0), 1)
        return peak * (1 - part * (1 - end))
    part = min(max((t - warmup) / (decay - warmup), 0), 1)
    shape = 1 - part if name == "linear" else 0.5 * (1 + math.cos(math.pi * part))
    return peak * (end + (1 - end) * shape)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_schedules_in_steps_equal_their_closed_forms(name):
    schedule = make_schedule(name, peak=2e-3, steps=100, warmup="10", decay="90%", cooldown="30", end_factor=0.1)
    for t in range(0, 130):
        if t < 10:
            expected = 2e-3 * (t + 1) / 10
        else:
            expected = closed_form(name, t, peak=2e-3, warmup=10, decay=90, cooldown=30, end=0.1)
        assert float(schedule(t)) == pytest.approx(expected, rel=1e-5), t
        assert float(jax.jit(schedule)(jnp.int32(t))) == pytest.approx(expected, rel=1e-5)


def test_schedules_without_warmup_start_at_the_peak():
    schedule = make_schedule("cosine", peak=1.0, steps=10, warmup="0")
    assert float(schedule(0)) == 1.0
    assert float(schedule(5)) == pytest.approx(0.55)


def test_schedules_in_tokens_follow_a_growing_batch():
    def tokens_at(step):  # batches of 100 tokens for 10 steps, then of 400
        return 100.0 * jnp.minimum(step, 10) + 400.0 * jnp.maximum(step - 10, 0)

    schedule = make_schedule(
        "cosine", peak=1.0, steps=40, warmup="500tok", decay="9Ktok", end_factor=0.1, tokens_at=tokens_at
    )
    for t in range(40):
        seen = float(tokens_at(t))
        after = closed_form("cosine", seen, peak=1.0, warmup=500, decay=9000, cooldown=1, end=0.1)
        expected = (seen + 100) / 500 if seen < 500 else after
        assert float(schedule(t)) == pytest.approx(expected, rel=1e-5), t
    mixed = make_schedule(
        "linear", peak=1.0, steps=40, warmup="500tok", decay="100%", end_factor=0, tokens_at=tokens_at
    )
    assert float(mixed(20)) == pytest.approx(1 - (5000 - 500) / (13000 - 500))


@pytest.mark.parametrize("decay", ["100%", "40", "13Ktok", "12900tok"])
def test_a_cooldown_in_steps_is_the_last_of_them_where_the_batch_grows(decay):
    def tokens_at(step):  # batches of 100 tokens for 10 steps, then of 400: 13,000 after 40
        return 100.0 * jnp.minimum(step, 10) + 400.0 * jnp.maximum(step - 10, 0)

    for cooldown in ("25%", "10"):
        schedule = make_schedule(
            "wsd",
            peak=1.0,
            steps=40,
            warmup="500tok",
            decay=decay,
            cooldown=cooldown,
            end_factor=0,
            tokens_at=tokens_at,
        )
        end = 12900 if decay == "12900tok" else 13000
        for t in range(5, 44):
            expected = min(1.0, max(0.0, (end - float(tokens_at(t))) / (end - 9000)))  # tokens_at(30) is 9000
            assert float(schedule(t)) == pytest.approx(expected, abs=1e-5), t
    whole = make_schedule(
        "wsd", peak=1.0, steps=40, warmup="0tok", decay=decay, cooldown="90", end_factor=0, tokens_at=tokens_at
    )
    assert float(whole(10)) == pytest.approx(1 - 1000 / end)


def test_gpt3s_schedule_warms_up_for_375m_tokens_and_reaches_a_tenth_at_260b():
    tokens = 2**19
    schedule = make_schedule(
        "cosine", peak=6e-4, steps=572_000, warmup="375Mtok", decay="260Btok", tokens_at=lambda s: s * float(tokens)
    )
    assert float(schedule(0)) == pytest.approx(6e-4 * tokens / 375e6, rel=1e-5)
    assert float(schedule(375_000_000 // tokens)) == pytest.approx(6e-4, rel=2e-3)
    assert float(schedule(500_000)) == pytest.approx(6e-5, rel=1e-4)
    middle = int((260e9 + 375e6) / 2 / tokens)
    assert float(schedule(middle)) == pytest.approx(6e-4 * 0.55, rel=1e-4)


def test_tokens_need_to_know_the_tokens_of_a_step():
    with pytest.raises(UserError, match="a schedule in tokens needs the number of tokens in a step"):
        make_schedule("cosine", peak=1.0, steps=10, warmup="100tok")
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        make_schedule("cosin", peak=1.0, steps=10)


def tree(seed=0, layers=3):
    """A small model's names and shapes: stacked kernels, an embedding, a bias, a norm."""
    rng = np.random.default_rng(seed)
    shapes = {
        "attention": {"qkv": {"kernel": (layers, 8, 3, 2, 4), "bias": (layers, 3, 2, 4)}},
        "mlp_norm": {"scale": (layers, 8)},
    }
    shapes["attention"]["out"] = {"kernel": (layers, 2, 4, 8)}
    shapes["mlp"] = {"up": {"kernel": (layers, 8, 16)}}
    leaves = {"embedding": (10, 8), "position_embedding": (6, 8), "layers": {"block_0": shapes}}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return {"model": jax.tree.map(lambda s: rng.normal(size=s).astype(np.float32), leaves, is_leaf=is_shape)}


def updates_of(optimizer, params, grads):
    """The updates of a list of gradients; parameters are moved along."""
    state, out = optimizer.tx.init(params), []
    run = jax.jit(optimizer.tx.update)
    for g in grads:
        updates, state = run(g, state, params)
        params = optax.apply_updates(params, updates)
        out.append(jax.device_get(updates))
    return out


def test_adamw_equals_its_formula_and_decays_matrices_and_embeddings_only():
    params, grads = tree(), [tree(seed=s) for s in (1, 2, 3)]
    rate, decay, b1, b2, eps = 0.01, 0.3, 0.8, 0.9, 1e-3
    optimizer = make_optimizer("adamw", rate, b1=b1, b2=b2, eps=eps, weight_decay=decay)
    got = updates_of(optimizer, params, grads)

    def formula(pick, decayed):
        p, m, v = pick(params).astype(np.float64), 0.0, 0.0
        for t, update in enumerate(got, 1):
            g = pick(grads[t - 1]).astype(np.float64)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decayed * decay * p
            np.testing.assert_allclose(pick(update), -rate * step, rtol=1e-4, atol=1e-7)
            p = p - rate * step

    block = lambda t: t["model"]["layers"]["block_0"]  # noqa: E731
    formula(lambda t: t["model"]["embedding"], 1)
    formula(lambda t: block(t)["attention"]["qkv"]["kernel"], 1)
    formula(lambda t: block(t)["mlp"]["up"]["kernel"], 1)
    formula(lambda t: t["model"]["position_embedding"], 0)
    formula(lambda t: block(t)["attention"]["qkv"]["bias"], 0)
    formula(lambda t: block(t)["mlp_norm"]["scale"], 0)


def test_the_first_matching_group_sets_rate_and_decay():
    params, grads = tree(), tree(seed=1)
    zero = jax.tree.map(np.zeros_like, grads)
    groups = (
        (r"model/embedding", {"lr": 0.5, "weight_decay": 0.0}),
        (r"model/.*qkv/bias", {"weight_decay": 1.0}),
        (r"model/layers/.*kernel", {"lr": (1.0, 0.1, 0.0)}),
        (r"model/.*", {}),
        (r"model/embedding", {"lr": 100.0}),
    )
    plain = updates_of(make_optimizer("adamw", 0.01, weight_decay=0.0), params, [grads])[0]["model"]
    got = updates_of(make_optimizer("adamw", 0.01, weight_decay=0.0, groups=groups), params, [grads])[0]["model"]
    np.testing.assert_allclose(got["embedding"], 0.5 * plain["embedding"], rtol=1e-6)
    np.testing.assert_allclose(got["position_embedding"], plain["position_embedding"], rtol=1e-6)
    kernel, plain_kernel = (x["layers"]["block_0"]["mlp"]["up"]["kernel"] for x in (got, plain))
    np.testing.assert_allclose(kernel, plain_kernel * np.array([1.0, 0.1, 0.0])[:, None, None], rtol=1e-6)
    decay = updates_of(make_optimizer("adamw", 0.01, weight_decay=0.2, groups=groups), params, [zero])[0]["model"]
    assert (decay["embedding"] == 0).all()
    bias = lambda t: t["layers"]["block_0"]["attention"]["qkv"]["bias"]  # noqa: E731
    np.testing.assert_allclose(bias(decay), -0.01 * bias(params["model"]), rtol=1e-6)


def test_the_first_matching_group_also_says_what_is_frozen():
    groups = ((".*bias", {}), ("model/h/.*", {"lr": 0.1}), (".*", {"frozen": True}), (".*kernel", {"frozen": True}))
    params = {"model": {"h": {"kernel": 1}, "bias": 2, "kernel": 3, "bias_like": 4}}
    trained, frozen = split(params, make_optimizer(groups=groups).frozen)
    assert trained == {"model": {"h": {"kernel": 1}, "bias": 2, "kernel": None, "bias_like": None}}
    assert frozen == {"model": {"h": {"kernel": None}, "bias": None, "kernel": 3, "bias_like": 4}}


def test_layers_at_rate_zero_stay_bit_for_bit():
    groups = ((r"model/layers/.*", {"lr": (0.0, 1.0, 0.0)}),)
    params, grads = tree(), [tree(seed=s) for s in (1, 2)]
    for updates in updates_of(make_optimizer("adamw", 0.01, weight_decay=0.3, groups=groups), params, grads):
        for leaf in jax.tree.leaves(updates["model"]["layers"]):
            assert (leaf[[0, 2]] == 0).all() and (leaf[1] != 0).all()
        assert (updates["model"]["embedding"] != 0).all()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "optax:sgd"])
def test_each_layer_learns_at_a_fixed_part_of_the_rate_of_the_one_above(name):
    # Two repetitions of a pattern of three blocks: layers 0 to 5, the first of each block being 0, 1 and 2.
    rng = np.random.default_rng(0)
    leaves = tree(layers=2)["model"]
    model = {**leaves, "layers": {f"block_{i}": leaves["layers"]["block_0"] for i in range(3)}}
    model["final_norm"] = {"scale": np.ones(8, np.float32)}
    params = {"model": model, "classifier": {"kernel": rng.normal(size=(8, 3)).astype(np.float32)}}
    grads = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)]
    plain, decayed = (
        updates_of(make_optimizer(name, 0.01, layer_decay=decay, pattern_length=3), params, grads)[0]
        for decay in (1.0, 0.8)
    )
    ratio = jax.tree.map(lambda a, b: a / b, decayed, plain)
    for block in range(3):
        for leaf in jax.tree.leaves(ratio["model"]["layers"][f"block_{block}"]):
            for repetition in range(2):
                layer = 3 * repetition + block
                np.testing.assert_allclose(leaf[repetition], 0.8 ** (6 - layer), rtol=1e-5)
    np.testing.assert_allclose(ratio["model"]["embedding"], 0.8**7, rtol=1e-5)
    np.testing.assert_allclose(ratio["model"]["position_embedding"], 0.8**7, rtol=1e-5)
    np.testing.assert_allclose(ratio["model"]["final_norm"]["scale"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio["classifier"]["kernel"], 1.0, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5])
def test_a_layer_decay_out_of_range_is_refused(decay):
    with pytest.raises(UserError, match=f"optimizer.layer_decay is {decay}; it must be above 0 and at most 1"):
        make_optimizer("adamw", 0.01, layer_decay=decay)


@pytest.mark.parametrize("groups", [(("(", {}),), ((".*", 2),), (".*",), ((3, {}),), ((".*", {}, {}),)])
def test_groups_of_another_form_are_refused(groups):
    with pytest.raises(UserError, match=r"optimizer\.groups has"):
        make_optimizer(groups=groups)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": "x"}, "has lr 'x'; it is a number, or one for each layer"),
        ({"lr": float("nan")}, "has lr nan"),
        ({"lr": True}, "has lr True"),
        ({"lr": (1.0, (2.0, 3.0))}, "has lr"),
        ({"weight_decay": "no"}, "has weight_decay 'no'; it is a number"),
        ({"weight_decay": (0.1, 0.2)}, "has weight_decay"),
        ({"frozen": "False"}, "has frozen 'False'; it is True or False"),
    ],
)
def test_settings_of_a_group_that_are_no_such_value_are_refused(settings, said):
    with pytest.raises(UserError, match=f"the optimizer group 'model/.*' {re.escape(said)}"):
        make_optimizer(groups=(("model/.*", settings),))


def test_groups_that_make_no_sense_are_refused():
    names = ["model/embedding", "model/layers/block_0/mlp/up/kernel"]
    check_groups(((r"model/.*", {"lr": 2.0}),), names)
    with pytest.raises(UserError, match=r"'model/embeding' matches no parameter; they are model/embedding"):
        check_groups((("model/embeding", {"lr": 2.0}),), names)
    with pytest.raises(UserError, match="did you mean 'weight_decay'"):
        check_groups((("model/.*", {"weight_decy": 2.0}),), names)
    groups = ((r"model/layers/.*kernel", {"lr": (1.0, 0.1)}),)
    with pytest.raises(UserError, match=r"2 learning-rate multipliers.*has 3 layers"):
        updates_of(make_optimizer("adamw", 0.01, groups=groups), tree(), [tree(seed=1)])


def matrix(leaf, inputs):
    """A stacked kernel as one matrix per layer, its first `inputs` axes after the layers' merged."""
    return leaf.reshape(leaf.shape[0], int(np.prod(leaf.shape[1 : 1 + inputs])), -1)


def test_muon_orthogonalises_each_layers_matrix():
    params, grads = tree(), tree(seed=1)
    update = updates_of(make_optimizer("muon", 1.0, weight_decay=0.0), params, [grads])[0]
    for pick, inputs in [
        (lambda t: t["attention"]["qkv"]["kernel"], 1),
        (lambda t: t["attention"]["out"]["kernel"], 2),
        (lambda t: t["mlp"]["up"]["kernel"], 1),
    ]:
        u = matrix(-pick(update["model"]["layers"]["block_0"]), inputs)
        g = matrix(pick(grads["model"]["layers"]["block_0"]), inputs)
        scale = math.sqrt(max(1, g.shape[2] / g.shape[1]))
        for layer in range(3):
            left, _, right = np.linalg.svd(g[layer], full_matrices=False)
            values = np.linalg.svd(u[layer] / scale, compute_uv=False)
            assert (values > 0.6).all() and (values < 1.3).all()  # five Newton-Schulz steps: about 1
            along = np.diag(left.T @ (u[layer] / scale) @ right.T)  # in the gradient's own singular directions
            assert (along > 0.6).all()


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_layers_stacked_are_updated_as_layers_alone(name):
    params, grads = tree(), tree(seed=1)
    block = grads["model"]["layers"]["block_0"]
    block["mlp"]["up"]["kernel"] *= np.array([1e-3, 1.0, 30.0], np.float32)[:, None, None]
    kwargs = dict(kwargs=dict(min_dim_size_to_factor=4)) if name == "adafactor" else {}
    optimizer = make_optimizer(name, 0.1, weight_decay=0.0, **kwargs)
    got = updates_of(optimizer, params, [grads, tree(seed=2)])[-1]
    for layer in range(3):

        def one(t, layer=layer):
            layers = jax.tree.map(lambda x: x[layer : layer + 1], t["model"]["layers"])
            return {"model": t["model"] | {"layers": layers}}

        alone = updates_of(optimizer, one(params), [one(grads), one(tree(seed=2))])[-1]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), alone, one(got))


def test_muon_leaves_embeddings_biases_and_norms_to_adam():
    params, grads = tree(), [tree(seed=1), tree(seed=2)]
    muon = updates_of(make_optimizer("muon", 0.1, b1=0.9, b2=0.95, weight_decay=0.0), params, grads)[-1]["model"]
    nesterov = optax.adamw(0.1, b1=0.9, b2=0.95, weight_decay=0.0, nesterov=True)
    adam = updates_of(make_optimizer("adamw", 0.1).__class__(nesterov, None), params, grads)[-1]["model"]
    np.testing.assert_allclose(muon["embedding"], adam["embedding"], rtol=1e-5)
    bias = lambda t: t["layers"]["block_0"]["attention"]["qkv"]["bias"]  # noqa: E731
    np.testing.assert_allclose(bias(muon), bias(adam), rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_epsilon_reaches_the_optimizer(name):
    params, grads = {"b": jnp.ones(3)}, {"b": jnp.full(3, 1e-4)}
    tx = make_optimizer(name, 1.0, eps=1.0, weight_decay=0.0)
    updates, _ = tx.tx.update(grads, tx.tx.init(params), params)
    assert float(jnp.abs(updates["b"]).max()) < 1e-3  # g / (g + 1), not g / g


def test_adafactor_keeps_a_row_and_a_column_per_layer_also_where_heads_are_small():
    params = {"model": {"layers": {"b": {"attention": {"qkv": {"kernel": jnp.zeros((3, 128, 3, 4, 16))}}}}}}
    state = make_optimizer("adafactor", 0.1).tx.init(params)
    factors = sorted(x.size for x in jax.tree.leaves(state) if x.size > 3)
    assert factors == [3 * 128, 3 * 3 * 4 * 16]


def test_adafactor_clips_an_update_of_one_layer_by_that_layer():
    from gpt_jax.optim import clip_by_layer_rms

    update = {
        "m": {"layers": {"kernel": np.stack([np.full((4, 4), 10.0), np.full((4, 4), 0.5)])}, "bias": np.full(4, 4.0)}
    }
    clipped, _ = clip_by_layer_rms(2.0).update(update, clip_by_layer_rms(2.0).init(update))
    np.testing.assert_allclose(clipped["m"]["layers"]["kernel"][:, 0, 0], [2.0, 0.5])
    np.testing.assert_allclose(clipped["m"]["bias"], 2.0)


def test_any_optax_transformation_by_import_path():
    params, grads = tree(), tree(seed=1)
    groups = ((r"model/embedding", {"lr": 0.5}),)
    got = updates_of(make_optimizer("optax:lion", 0.1, groups=groups, kwargs=dict(b1=0.7)), params, [grads])[0]["model"]
    np.testing.assert_allclose(got["embedding"], -0.05 * np.sign(grads["model"]["embedding"]), rtol=1e-2, atol=1e-4)
    with pytest.raises(UserError, match=r"cannot import 'optax:lyon'"):
        make_optimizer("optax:lyon")
    with pytest.raises(UserError, match=r"optimizer\.name is 'adamv' \(did you mean 'adamw'\?\)"):
        make_optimizer("adamv")


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("adamw", {"nesterof": True}, "a key of optimizer.kwargs for adamw is 'nesterof' (did you mean 'nesterov'?)"),
        ("adamw", {"b1": 0.5}, "a key of optimizer.kwargs for adamw is 'b1'"),  # optimizer.b1 says it
        ("adafactor", {"decoy": 1}, "optimizer.kwargs for adafactor is 'decoy'"),
        ("muon", {"ns_step": 3}, "optimizer.kwargs for muon is 'ns_step' (did you mean 'ns_steps'?)"),
        ("optax:lion", {"b3": 0.5}, "optimizer.kwargs for optax:lion is 'b3'"),
        ("optax:clip", {}, "optimizer.name is 'optax:clip', which is no function that takes 'learning_rate'"),
        ("optax:__version__", {}, "optimizer.name is 'optax:__version__', which is no function"),
        ("optax.contrib:dpsgd", {}, "optimizer.kwargs is {}; optax.contrib:dpsgd needs l2_norm_clip, "),
    ],
)
def test_arguments_that_an_optimizer_does_not_take_or_lacks_are_one_sentence(name, kwargs, said):
    with pytest.raises(UserError) as error:
        make_optimizer(name, kwargs=kwargs)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_group_sets_no_weight_decay_of_an_optimizer_that_decays_by_itself():
    groups = ((".*bias", {"lr": 0.5}), (".*kernel", {"weight_decay": 0.0}))
    with pytest.raises(UserError, match=r"group '\.\*kernel' sets weight_decay, but optax:adamw decays by itself"):
        make_optimizer("optax:adamw", groups=groups)
    make_optimizer("optax:adamw", groups=groups[:1], kwargs={"nesterov": True, "mu_dtype": "bfloat16"})
