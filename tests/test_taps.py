"""Taps: what is read of a forward pass changes no bit of it, and what is put in its place counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import params_of, tiny, tokens

from gpt_jax.model import Mask, Transformer
from gpt_jax.model.taps import KINDS, Taps

CONFIGS = {
    "gpt2": tiny(),
    "alternating": tiny(pattern=("dense", "band"), window=3, unroll=1, query_block=4),
    "modern": tiny(positions="rope", norm="rmsnorm", qk_norm=True, ffn="swiglu", num_kv_heads=2, bias=False),
    "unequal": tiny(head_dims=(2, 2, 4, 8)),
}


def run(config, params, ids, taps=None, **options):
    model = Transformer(config)
    return jax.jit(lambda p, t: model.apply({"params": p}, t, taps=taps, **options))(params, ids)


@pytest.mark.parametrize("name", CONFIGS)
def test_collecting_changes_no_bit_of_the_logits(name):
    config = CONFIGS[name]
    params, ids = params_of(config), tokens()
    plain, tapped = run(config, params, ids), run(config, params, ids, Taps(collect=KINDS))
    assert plain.intermediates is None
    np.testing.assert_array_equal(np.asarray(plain.logits), np.asarray(tapped.logits))
    found = tapped.intermediates
    L, H = config.num_layers, config.num_heads
    weights = np.asarray(found["attention"])
    assert weights.shape == (L, 2, H, 12, 12) and found["heads"].shape == (L, 2, 12, H, config.key_size)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    assert not np.triu(weights, 1).any()
    if name == "alternating":
        near = np.arange(12)[:, None] - np.arange(12) < 3
        assert weights[0][..., ~near].any() and not weights[1][..., ~near].any()


def test_the_residual_stream_is_the_sum_of_what_was_added():
    config = CONFIGS["gpt2"]
    found = run(config, params_of(config), tokens(), Taps(collect=KINDS)).intermediates
    for layer in range(2):
        after = found["residual"][layer] + found["attention_out"][layer] + found["mlp_out"][layer]
        expected = found["residual"][1] if layer == 0 else found["residual_out"]
        np.testing.assert_allclose(after, expected, atol=1e-5)


def test_weights_are_those_of_the_numpy_model():
    config = CONFIGS["gpt2"]
    params, ids = params_of(config), tokens()
    found = run(config, params, ids, Taps(collect=("attention", "residual"))).intermediates
    block = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), params["layers"]["block_0"])
    x = np.asarray(found["residual"][0], np.float64)
    norm = block["attention_norm"]
    h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]
    qkv = np.einsum("btd,dnhk->nbthk", h, block["attention"]["qkv"]["kernel"])
    q, k, _ = qkv + block["attention"]["qkv"]["bias"][:, None, None]
    scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(4)
    scores[:, :, np.triu(np.ones((12, 12), bool), 1)] = -np.inf
    expected = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(found["attention"][0], expected / expected.sum(-1, keepdims=True), atol=1e-5)


def test_gates_of_one_are_the_identity_and_of_zero_cut_a_head_out():
    config = CONFIGS["gpt2"]
    params, ids = params_of(config), tokens()
    ones = jnp.ones((2, 4))
    plain = run(config, params, ids).logits
    np.testing.assert_array_equal(plain, run(config, params, ids, Taps(gates_LxH=ones)).logits)
    gates = ones.at[1, 2].set(0.0)
    without = jax.tree.map(np.array, params)
    without["layers"]["block_0"]["attention"]["out"]["kernel"][1, 2] = 0.0  # what it would write is nothing
    expected = run(config, without, ids).logits
    np.testing.assert_allclose(run(config, params, ids, Taps(gates_LxH=gates)).logits, expected, atol=1e-5)
    fill = jnp.ones((2, 4, 4))
    filled = run(config, params, ids, Taps(gates_LxH=gates, fill_LxHxK=fill)).logits
    moved = jax.tree.map(np.array, without)
    out = np.asarray(params["layers"]["block_0"]["attention"]["out"]["kernel"][1, 2])
    moved["layers"]["block_0"]["attention"]["out"]["bias"][1] += out.sum(0)
    np.testing.assert_allclose(filled, run(config, moved, ids).logits, atol=1e-5)


def test_patches_replace_where_they_say():
    config = CONFIGS["gpt2"]
    params, ids = params_of(config), tokens()
    other = run(config, params, tokens(seed=1), Taps(collect=("residual", "heads")))
    residual, heads = other.intermediates["residual"], other.intermediates["heads"]
    plain = run(config, params, ids).logits
    nowhere = Taps(residual_LxBxTxD=residual, residual_where_LxBxT=jnp.zeros((2, 2, 12), bool))
    np.testing.assert_array_equal(plain, run(config, params, ids, nowhere).logits)
    everywhere = nowhere.replace(residual_where_LxBxT=jnp.ones((2, 2, 12), bool).at[1].set(False))
    np.testing.assert_allclose(run(config, params, ids, everywhere).logits, other.logits, atol=1e-5)
    late = nowhere.replace(residual_where_LxBxT=jnp.zeros((2, 2, 12), bool).at[0, :, 7:].set(True))
    got = run(config, params, ids, late).logits
    np.testing.assert_array_equal(np.asarray(plain)[:, :7], np.asarray(got)[:, :7])
    assert np.abs(np.asarray(plain)[:, 7:] - np.asarray(got)[:, 7:]).max() > 1e-3
    some = Taps(heads_LxBxTxHxK=heads, heads_where_LxBxTxH=jnp.zeros((2, 2, 12, 4), bool).at[1, :, :, 3].set(True))
    kept = run(config, params, ids, some.replace(collect=("heads",))).intermediates["heads"]
    np.testing.assert_array_equal(kept[1, :, :, 3], heads[1, :, :, 3])


def test_a_bidirectional_mask_has_weights_on_both_sides():
    config = CONFIGS["gpt2"]
    segments = np.array([[1] * 6 + [2] * 6] * 2, np.int32)
    mask = Mask("bidirectional", segments_BxT=segments)
    weights = np.asarray(
        run(config, params_of(config), tokens(), Taps(collect=("attention",)), mask=mask).intermediates["attention"]
    )
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    assert (weights[..., :6, :6] > 0).all() and not weights[..., :6, 6:].any()


def test_without_taps_nothing_is_traced_for_them():
    config = CONFIGS["gpt2"]
    model, params = Transformer(config), params_of(config)
    plain = jax.jit(lambda p, t: model.apply({"params": p}, t).logits).lower(params, tokens())
    tapped = jax.jit(lambda p, t: model.apply({"params": p}, t, taps=Taps(collect=KINDS))).lower(params, tokens())
    hidden = jax.jit(lambda p, t: model.apply({"params": p}, t, method="encode")[0]).lower(params, tokens())
    flops = [x.cost_analysis()["flops"] for x in (hidden, plain, tapped)]
    assert flops[0] < flops[1] < flops[2]
    assert "4x12x12" not in str(plain.out_info) and plain.as_text().count("dot_general") < tapped.as_text().count(
        "dot_general"
    )
