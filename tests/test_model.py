"""The decoder stack against NumPy, closed forms and its own promises about masks, loops and parameters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn
from helpers import VOCAB, apply_of, assert_trees_close, initial_params, params_of, relative, tiny, tokens

from gpt_jax.errors import UserError
from gpt_jax.model import Cache, Mask, ModelConfig, Transformer, count_parameters
from gpt_jax.model.attention import Variant, attend
from gpt_jax.model.layers import MLP
from gpt_jax.model.taps import Taps
from gpt_jax.presets import GPT2, GPT3, PRESETS
from gpt_jax.sharding import is_boxed, path_name

VARIANTS = {
    "gpt2": dict(),
    "gpt3_band_no_bias": dict(pattern=("dense", "band"), window=3, bias=False, query_block=4),
    "llama": dict(
        positions="rope", num_kv_heads=2, ffn="swiglu", norm="rmsnorm", qk_norm=True, tie_embeddings=False, bias=False
    ),
    "article": dict(ffn="relu_tanh", talking_heads=True, positions="alibi"),
    "head_dims": dict(head_dims=(2, 6, 5, 3), ffn="relu2"),
    "factorised": dict(embedding_size=6, qk_norm=True),
    "caps": dict(logit_softcap=3.0, attention_softcap=0.8, positions="none", ffn="gelu", head_dim=6, num_kv_heads=1),
}
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 2 + [2] * 10], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]], np.int32)


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_pass_equals_numpy(name):
    config = tiny(**VARIANTS[name])
    params = params_of(config)
    out = apply_of(config)(params, tokens())
    expected = oracle.forward(params, config, tokens())
    assert out.logits.shape == (2, 12, VOCAB) and out.logits.dtype == jnp.float32
    np.testing.assert_allclose(out.logits, expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("name", ["gpt2", "llama", "article"])
def test_packed_forward_pass_equals_numpy(name):
    config = tiny(**VARIANTS[name], query_block=4)
    params = params_of(config)
    out = apply_of(config)(params, tokens(), mask=Mask("causal", SEGMENTS), positions=POSITIONS)
    expected = oracle.forward(params, config, tokens(), segments=SEGMENTS, positions=POSITIONS)
    where = SEGMENTS > 0
    np.testing.assert_allclose(out.logits[where], expected[where], atol=1e-5 * max(1.0, np.nanmax(np.abs(expected))))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradient_equals_finite_differences_of_numpy(name):
    config = tiny(**VARIANTS[name])
    params, ids = params_of(config), tokens()
    model = Transformer(config)
    rng = np.random.default_rng(3)
    cotangent = rng.normal(size=(2, 12, VOCAB))
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, ids).logits * cotangent)))(params)

    def value(epsilon):
        moved = jax.tree.map(lambda p, d: p.astype(np.float64) + epsilon * d, params, direction)
        return np.sum(oracle.forward(moved, config, ids) * cotangent)

    expected = (value(1e-6) - value(-1e-6)) / 2e-6
    got = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
    assert got == pytest.approx(expected, rel=2e-4)


def influence(config, mask=None):
    """|d logits[t] / d embedding[s]| of one row, [T, T]: a position's embedding enters at that position only."""
    model, params, ids = Transformer(config), params_of(config), tokens(rows=1)
    projection = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32)

    def projected(table):
        return model.apply({"params": params | {"position_embedding": table}}, ids, mask=mask).logits[0] @ projection

    return np.abs(jax.jit(jax.jacrev(projected))(params["position_embedding"])).sum(-1)


@pytest.mark.parametrize("attention", ["blocks", "dense"])
def test_future_embeddings_have_exactly_no_influence(attention):
    seen = influence(tiny(attention=attention, query_block=5))
    future = np.triu(np.ones((12, 12), bool), 1)
    assert (seen[future] == 0).all()
    assert (seen[~future] > 0).all()


def test_a_banded_stack_sees_exactly_layers_times_window_minus_one_back():
    layers, window = 3, 3
    seen = influence(tiny(num_layers=layers, pattern=("band",), window=window, query_block=4))
    back = np.arange(12)[:, None] - np.arange(12)[None, :]
    reach = layers * (window - 1)
    assert (seen[(back > reach) | (back < 0)] == 0).all()
    assert (seen[(back >= 0) & (back <= reach)] > 0).all()


def test_a_prefix_is_seen_from_everywhere_and_the_rest_is_causal():
    seen = influence(tiny(query_block=4), Mask("prefix", prefix_BxT=np.arange(12)[None] < 5))
    expected = np.tril(np.ones((12, 12), bool)) | (np.arange(12) < 5)[None, :]
    assert ((seen > 0) == expected).all()


def test_each_packed_document_has_a_prefix_of_its_own():
    segments = np.repeat([1, 2, 0], [5, 6, 1])[None]
    prefix = np.isin(np.arange(12), [0, 1, 5, 6, 7])[None]
    seen = influence(tiny(query_block=4), Mask("prefix", segments_BxT=segments, prefix_BxT=prefix))
    expected = (np.tril(np.ones((12, 12), bool)) | prefix) & (segments.T == segments)
    assert ((seen > 0) == expected)[:11].all()  # the last position is padding


def test_a_prefix_entered_into_the_cache_at_once_gives_the_prefix_mask():
    config, ids = tiny(), tokens()
    params, run = params_of(config), apply_of(config)
    expected = run(params, ids, mask=Mask("prefix", prefix_BxT=np.broadcast_to(np.arange(12) < 5, ids.shape))).logits
    out = run(params, ids[:, :5], mask=Mask("bidirectional"), cache=Cache.empty(config, 2, 12))
    logits = [out.logits]
    for t in range(5, 12):
        out = run(params, ids[:, t : t + 1], cache=out.cache)
        logits.append(out.logits)
    np.testing.assert_allclose(np.concatenate(logits, 1), expected, rtol=1e-4, atol=1e-5)


def test_bidirectional_logits_depend_on_the_right():
    assert (influence(tiny(query_block=4), Mask("bidirectional")) > 0).all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "article", "gpt3_band_no_bias"])
def test_a_packed_document_gives_what_it_gives_alone(name):
    config = tiny(**VARIANTS[name], max_positions=12)
    params, ids = params_of(config), tokens()
    packed = apply_of(config)(params, ids, mask=Mask("causal", SEGMENTS), positions=POSITIONS).logits
    for row, segment in [(0, 1), (0, 2), (1, 2)]:
        where = SEGMENTS[row] == segment
        alone = apply_of(config)(params, ids[row][where][None]).logits[0]
        np.testing.assert_allclose(packed[row][where], alone, atol=1e-5)
    other = np.where(SEGMENTS == 1, (ids + 1) % VOCAB, ids)  # documents cannot see each other: not one bit changes
    changed = apply_of(config)(params, other, mask=Mask("causal", SEGMENTS), positions=POSITIONS).logits
    assert (np.asarray(changed)[SEGMENTS == 2] == np.asarray(packed)[SEGMENTS == 2]).all()
    assert (np.asarray(changed)[SEGMENTS == 1] != np.asarray(packed)[SEGMENTS == 1]).any()


def test_without_segments_documents_leak_into_each_other():
    config = tiny()
    a, b = tokens(), tokens()
    b[:, 0] = (b[:, 0] + 1) % VOCAB
    difference = apply_of(config)(params_of(config), a).logits - apply_of(config)(params_of(config), b).logits
    assert (np.abs(difference).max(-1) > 0).all()


def loss_and_gradient(config, params):
    model, ids = Transformer(config), tokens()
    cotangent = np.random.default_rng(4).normal(size=(2, 12, VOCAB)).astype(np.float32)
    return jax.jit(jax.value_and_grad(lambda p: jnp.mean(model.apply({"params": p}, ids).logits * cotangent)))(params)


EXECUTIONS = {
    "unrolled": dict(unroll=0),
    "half_unrolled": dict(unroll=2),
    "remat_full": dict(remat="full"),
    "remat_dots": dict(remat="dots"),
    "remat_dots_no_batch": dict(remat="dots_no_batch"),
    "remat_offload": dict(remat="offload_dots"),
    "remat_unrolled": dict(remat="full", unroll=0),
    "not_flattened": dict(flatten=False),
    "dense_attention": dict(attention="dense"),
}


@pytest.fixture(scope="module")
def plain_execution():
    config = tiny(num_layers=8, pattern=("dense", "band"), window=3, query_block=6)
    return config, loss_and_gradient(config, params_of(config))


@pytest.mark.parametrize("name", EXECUTIONS)
def test_execution_choices_change_neither_tree_nor_numbers(name, plain_execution):
    config, (loss, grads) = plain_execution
    other = tiny(num_layers=8, pattern=("dense", "band"), window=3, query_block=6, **EXECUTIONS[name])
    shapes = jax.eval_shape(Transformer(other).init, jax.random.key(0), tokens())
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(
        jnp.shape, jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens())
    )
    got_loss, got = loss_and_gradient(other, params_of(config))
    assert float(got_loss) == pytest.approx(float(loss), rel=1e-5)
    assert relative(got, grads) < 1e-5


def lowered_gradient(**kw):
    config = tiny(num_layers=4, **kw)
    params, model = params_of(config), Transformer(config)
    return jax.jit(jax.grad(lambda p: model.apply({"params": p}, tokens()).logits.sum())).lower(params).as_text()


def test_remat_recomputes_what_it_promises():
    def products(**kw):
        return lowered_gradient(**kw).count("stablehlo.dot_general")

    assert products(remat="full") > products(remat="dots") == products()


def test_the_compiler_may_not_merge_what_remat_computes_twice_where_layers_are_written_out():
    assert "optimization_barrier" in lowered_gradient(remat="full", unroll=0)
    assert "optimization_barrier" not in lowered_gradient(unroll=0)


def test_equal_head_dims_are_the_standard_heads():
    standard, article = tiny(), tiny(head_dims=(4, 4, 4, 4))
    params = params_of(standard)
    a = params["layers"]["block_0"]["attention"]
    L, D = 2, 16
    flat = {
        "qkv": {"kernel": a["qkv"]["kernel"].reshape(L, D, 3, D), "bias": a["qkv"]["bias"].reshape(L, 3, D)},
        "out": {"kernel": a["out"]["kernel"].reshape(L, D, D), "bias": a["out"]["bias"]},
    }
    block = params["layers"]["block_0"] | {"attention": flat}
    other = params | {"layers": {"block_0": block}}
    np.testing.assert_allclose(
        apply_of(article)(other, tokens()).logits, apply_of(standard)(params, tokens()).logits, atol=1e-5
    )


def test_identity_mixing_is_the_standard_attention_and_is_where_talking_heads_start():
    params = params_of(tiny())
    fresh = initial_params(tiny(talking_heads=True))["layers"]["block_0"]["attention"]
    mixing = {name: fresh[name] for name in ("mix_scores", "mix_weights")}
    assert (mixing["mix_scores"] == np.eye(4)).all() and (mixing["mix_weights"] == np.eye(4)).all()
    block = params["layers"]["block_0"]
    other = params | {"layers": {"block_0": block | {"attention": block["attention"] | mixing}}}
    np.testing.assert_allclose(
        apply_of(tiny(talking_heads=True))(other, tokens()).logits,
        apply_of(tiny())(params, tokens()).logits,
        atol=1e-5,
    )


def test_the_articles_ffn_stays_inside_the_unit_cube():
    x = 5 * np.random.default_rng(0).normal(size=(2, 12, 16)).astype(np.float32)

    def largest(ffn):
        mlp = MLP(tiny(ffn=ffn, init_std=0.1))
        params = nn.unbox(mlp.init(jax.random.key(0), x))
        return float(np.abs(mlp.apply(params, x)).max())

    assert 0.5 < largest("relu_tanh") < 1
    assert largest("gelu_tanh") > 1


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes_have_their_exact_parameter_counts(name):
    preset = PRESETS[name]
    config = preset.config()
    assert count_parameters(config) == preset.parameters
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    stored = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert stored - (config.padded_vocab - config.vocab_size) * config.d_model == preset.parameters


def test_the_published_counts_are_those_of_the_papers():
    assert [p.parameters for p in GPT3.values()] == [
        125_226_240,
        355_871_744,
        760_300_032,
        1_315_723_264,
        2_651_553_280,
        6_658_404_352,
        12_853_386_240,
        174_604_259_328,
    ]
    assert GPT2["gpt2_124m"].parameters == 124_439_808
    printed = [0.125e9, 0.356e9, 0.760e9, 1.320e9, 2.650e9, 6.660e9, 12.850e9, 174.600e9]  # GPT-3, Table D.1
    for preset, count in zip(GPT3.values(), printed, strict=True):
        assert preset.parameters == pytest.approx(count, rel=0.005)
        assert preset.model["d_model"] % preset.model["num_heads"] == 0
    assert [p.batch_size for p in GPT3.values()] == [256, 256, 256, 512, 512, 1024, 1024, 1536]


@pytest.mark.parametrize("name", VARIANTS)
def test_count_parameters_equals_what_init_makes(name):
    config = tiny(**VARIANTS[name])
    stored = sum(x.size for x in jax.tree.leaves(params_of(config)))
    tables = 1 if config.tie_embeddings else 2
    assert count_parameters(config) == stored - tables * (config.padded_vocab - config.vocab_size) * config.embed_size


def test_a_block_of_the_users_own_takes_the_place_of_the_built_in_one():
    """GPT-J's parallel block in tests/toys.py, scanned, written out and rematerialised, against its formula."""
    config = tiny(block="toys:ParallelBlock", num_layers=2)
    params = params_of(config)
    stored = sum(x.size for x in jax.tree.leaves(params))
    assert count_parameters(config) == stored - (config.padded_vocab - config.vocab_size) * config.embed_size
    assert set(params["layers"]["block_0"]) == {"norm", "attention", "mlp"}
    batch = tokens(rows=2, length=8)
    logits = [
        Transformer(tiny(block="toys:ParallelBlock", num_layers=2, **how)).apply({"params": params}, batch).logits
        for how in ({"unroll": 1}, {"unroll": 0}, {"unroll": 1, "remat": "full"})
    ]
    for other in logits[1:]:
        np.testing.assert_allclose(logits[0], other, atol=1e-5)
    with pytest.raises(UserError, match=r"block 'toys:ParallelBlock' gives no attention for a look inside"):
        Transformer(config).apply({"params": params}, batch, taps=Taps(collect=("attention",)))
    with pytest.raises(UserError, match=r"block is 'parallel'; it is an import path"):
        tiny(block="parallel")
    with pytest.raises(UserError, match=r"cannot import 'toys:Nothing'"):
        params_of(tiny(block="toys:Nothing"))


def test_a_factorised_embedding_costs_vocabulary_times_its_own_width():
    full, small = (ModelConfig(vocab_size=1000, max_positions=64, d_model=256, embedding_size=e) for e in (0, 32))
    projections = 256 * 32 + 256 + 32 * 256 + 32
    assert count_parameters(small) == count_parameters(full) - (1000 + 64) * (256 - 32) + projections
    untied = ModelConfig(vocab_size=1000, max_positions=64, d_model=256, embedding_size=32, tie_embeddings=False)
    assert count_parameters(untied) == count_parameters(small) + 1000 * 32
    with pytest.raises(UserError, match=r"embedding_size is -1"):
        ModelConfig(embedding_size=-1)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_names_a_logical_axis_for_each_dimension(name):
    shapes = jax.eval_shape(Transformer(tiny(**VARIANTS[name])).init, jax.random.key(0), tokens())
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes, is_leaf=is_boxed):
        assert is_boxed(leaf), path_name(path)
        assert len(leaf.names) == leaf.value.ndim, (path_name(path), leaf.names, leaf.value.shape)
        if "/layers/" in path_name(path):
            assert leaf.names[0] == "layers"


def test_initial_weights_have_gpt2s_standard_deviations():
    config = tiny(num_layers=8, d_model=64, d_ff=256, vocab_size=512, max_positions=512, num_heads=4)
    params = initial_params(config)
    block = params["layers"]["block_0"]
    residual = 0.02 / math.sqrt(2 * 8)
    for leaf, std in [
        (params["embedding"], 0.02),
        (params["position_embedding"], 0.01),
        (block["attention"]["qkv"]["kernel"], 0.02),
        (block["mlp"]["up"]["kernel"], 0.02),
        (block["attention"]["out"]["kernel"], residual),
        (block["mlp"]["down"]["kernel"], residual),
    ]:
        assert leaf.std() == pytest.approx(std, rel=0.03)
        assert abs(leaf.mean()) < 5 * std / math.sqrt(leaf.size)
    assert (block["mlp"]["up"]["bias"] == 0).all() and (block["mlp_norm"]["scale"] == 1).all()
    assert len({float(x) for x in block["mlp"]["up"]["kernel"][:, 0, 0]}) == 8  # every layer has its own draw


def test_loss_at_the_start_is_that_of_random_logits():
    config = ModelConfig(vocab_size=50257, num_layers=2, d_model=768, num_heads=12, max_positions=64)
    ids, targets = tokens(2, 64, vocab=50257), tokens(2, 64, seed=1, vocab=50257)
    logits = apply_of(config)(initial_params(config), ids).logits
    loss = -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1))
    assert float(loss) == pytest.approx(math.log(50257) + 0.5 * 768 * 0.02**2, abs=0.1)


def test_padding_of_the_vocabulary_reaches_neither_logits_nor_gradients():
    config = tiny()
    params = params_of(config)
    loud = params | {"embedding": np.concatenate([params["embedding"][:VOCAB], np.full((3, 16), 1e4, np.float32)])}
    assert (apply_of(config)(loud, tokens()).logits == apply_of(config)(params, tokens()).logits).all()
    padded = apply_of(config, "unembed")(params, np.ones((2, 12, 16), np.float32))
    assert padded.shape == (2, 12, 40) and (jax.nn.softmax(padded)[..., VOCAB:] == 0).all()
    model = Transformer(config)

    def loss(p):
        hidden, _ = model.apply({"params": p}, tokens(), method="encode")
        return jax.nn.logsumexp(model.apply({"params": p}, hidden, method="unembed")).sum()

    assert (jax.jit(jax.grad(loss))(params)["embedding"][VOCAB:] == 0).all()


def test_learned_positions_refuse_more_tokens_than_they_have():
    with pytest.raises(UserError, match=r"^13 tokens do not fit the model's 12 learned positions\."):
        Transformer(tiny()).apply({"params": params_of(tiny())}, tokens(length=13))
    config = tiny(positions="rope")
    assert apply_of(config)(params_of(config), tokens(length=13)).logits.shape == (2, 13, VOCAB)


def row_keys(n, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))


def test_dropout_of_a_row_does_not_depend_on_the_rows_beside_it():
    config = tiny(dropout=0.3, query_block=6)
    params, ids, keys = params_of(config), tokens(rows=4), row_keys(4)
    run = apply_of(config)
    whole = np.asarray(run(params, ids, keys=keys).logits)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(run(params, ids[order], keys=keys[order]).logits, whole[order], atol=1e-5)
    half = np.array([3, 1])
    np.testing.assert_allclose(run(params, ids[half], keys=keys[half]).logits, whole[half], atol=1e-5)
    assert np.abs(run(params, ids, keys=row_keys(4, seed=1)).logits - whole).max() > 0.1
    assert (run(params, ids, keys=keys).logits == whole).all()
    np.testing.assert_allclose(run(params, ids).logits, apply_of(tiny())(params, ids).logits, atol=1e-5)


def test_dropout_keeps_the_mean_and_drops_at_its_rate():
    from gpt_jax.model.random import dropout

    x = np.full((64, 500), 2.0, np.float32)
    for rate in (0.1, 0.5):
        out = np.asarray(dropout(x, rate, row_keys(64)))
        assert (out == 0).mean() == pytest.approx(rate, abs=0.01)
        assert out.mean() == pytest.approx(2.0, abs=0.02 * 2)
        np.testing.assert_allclose(out[out > 0], 2.0 / (1 - rate), rtol=1e-6)
    assert len({row.tobytes() for row in out}) == 64


@pytest.mark.parametrize("pattern", [("dense",), ("dense", "band")])
def test_every_layer_and_site_of_dropout_draws_for_itself(pattern):
    """All kernels are 0, so each of four branches adds dropout(1): one common draw would give two values, not five."""
    config = tiny(dropout=0.5, pattern=pattern)
    params = jax.tree.map(np.zeros_like, params_of(config))
    for block in params["layers"].values():
        block["attention"]["out"]["bias"][:] = 1
        block["mlp"]["down"]["bias"][:] = 1
    params["final_norm"]["scale"][:] = 1
    hidden = apply_of(config)(params, tokens(), keys=row_keys(2)).hidden
    values = [len(set(np.round(np.asarray(token), 3).tolist())) for row in hidden for token in row]
    assert max(values) == 5 and min(values) >= 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_single_precision(dtype):
    config = tiny(dtype=dtype)
    params = params_of(config, noise=0.02)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    half = apply_of(config)(params, tokens())
    single = apply_of(tiny())(params, tokens())
    assert half.logits.dtype == jnp.float32 and half.hidden.dtype == jnp.dtype(dtype)
    assert 0 < np.abs(half.logits - single.logits).max() < 0.02 * np.abs(single.logits).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_slopes_pass_attention_in_half_precision(dtype):
    q = k = jnp.zeros((1, 1024, 1, 8), dtype)  # every key gets 1/1024 of every query's slope
    v = jnp.ones_like(q)
    _, back = jax.vjp(lambda v: attend(q, k, v, Mask("bidirectional"), Variant(), block=None), v)
    (slope,) = back(jnp.full(v.shape, 1e-5, dtype))
    np.testing.assert_allclose(np.asarray(slope, np.float32), 1e-5, rtol=0.03)


NAN = float("nan")
ZERO_OR_MORE = ("head_dim", "d_ff", "num_kv_heads", "unroll", "max_positions", "embedding_size", "vocab_size")
ABOVE_ZERO, NONE = ("rope_base", "norm_eps"), (0.0, -1.0, NAN)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(num_heads=3), r"num_heads is 3, which does not divide d_model=16"),
        (dict(num_kv_heads=3), r"num_kv_heads is 3, which does not divide num_heads=4"),
        (dict(ffn="gelu_tan"), r"ffn is 'gelu_tan' \(did you mean 'gelu_tanh'\?\)"),
        (dict(remat="ful"), r"remat is 'ful' \(did you mean 'full'\?\)"),
        (dict(positions="rop"), r"did you mean 'rope'"),
        (dict(pattern=("dense", "bnad")), r"did you mean 'band'"),
        (dict(pattern=("dense", "band", "band")), r"num_layers is 2, not a multiple"),
        (dict(head_dims=(4, 4, 4)), r"head_dims has 3 sizes for num_heads=4"),
        (dict(head_dims=(4, 4, 4, 5)), r"head_dims sums to 17; it must be d_model=16"),
        (dict(positions="rope", head_dim=3), r"rope needs an even head_dim, not 3"),
        (dict(dropout=1.0), r"dropout is 1\.0"),
        (dict(num_layers=0), r"num_layers is 0"),
        (dict(vocab_multiple=0), r"vocab_multiple is 0"),
        *((dict([(name, -2)]), f"^{name} is -2; it must be 0 .*or more") for name in ZERO_OR_MORE),
        *((dict([(name, value)]), f"^{name} is {value}; it must be above 0") for name in ABOVE_ZERO for value in NONE),
        (dict(init_std=NAN), r"init_std is nan"),
        (dict(logit_softcap=NAN), r"logit_softcap is nan"),
        (dict(rope_factor=NAN), r"rope_factor is nan"),
        (dict(head_dims=(24, -8, 0, 0)), r"head_dims is \(24, -8, 0, 0\); each size must be at least 1"),
    ],
)
def test_impossible_models_are_refused_in_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        tiny(**overrides)
    assert "\n" not in str(error.value)


def test_trees_are_compared_leaf_by_leaf():  # the helper that other tests stand on
    with pytest.raises(AssertionError):
        assert_trees_close({"a": np.ones(3)}, {"a": np.ones(3) + 1e-3}, rtol=1e-6, atol=0)
    with pytest.raises(AssertionError):
        assert_trees_close({"a": np.ones(3)}, {"b": np.ones(3)}, rtol=1e-6, atol=0)
