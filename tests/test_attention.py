"""attention.py against brute force over (query, key) pairs, and against its own closed forms."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from gpt_jax.errors import UserError
from gpt_jax.model.attention import Mask, Variant, attend
from gpt_jax.model.chunks import attend_chunks
from gpt_jax.model.positions import alibi_slopes, rotate

B, T, H, K = 2, 11, 4, 8
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]], np.int32)
PREFIX = np.array([4, 7], np.int32)


def draws(kv_heads=H, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(B, T, H, K), (B, T, kv_heads, K), (B, T, kv_heads, K)]
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


def in_prefix(lengths):
    return np.arange(T) < lengths[:, None]


def mixing(seed=1):
    return (np.eye(H) + 0.3 * np.random.default_rng(seed).normal(size=(H, H))).astype(np.float32)


# name -> (what oracle.attention takes, key/value heads)
VARIANTS = {
    "causal": (dict(), H),
    "bidirectional": (dict(kind="bidirectional"), H),
    "prefix": (dict(kind="prefix", prefix=PREFIX), H),
    "window": (dict(window=4), H),
    "window_of_one": (dict(window=1), H),
    "window_bidirectional": (dict(window=3, kind="bidirectional"), H),
    "window_prefix": (dict(window=5, kind="prefix", prefix=PREFIX), H),
    "segments": (dict(segments=SEGMENTS), H),
    "segments_bidirectional": (dict(segments=SEGMENTS, kind="bidirectional"), H),
    "segments_window": (dict(segments=SEGMENTS, window=3), H),
    "alibi": (dict(alibi=True), H),
    "alibi_bidirectional": (dict(alibi=True, kind="bidirectional"), H),
    "softcap": (dict(softcap=0.7), H),
    "grouped": (dict(), 2),
    "one_kv_head": (dict(alibi=True), 1),
    "talking_heads": (dict(mix_scores=mixing(1), mix_weights=mixing(2)), H),
    "everything": (
        dict(
            kind="prefix",
            prefix=PREFIX,
            window=6,
            segments=SEGMENTS,
            softcap=1.3,
            alibi=True,
            mix_scores=mixing(1),
            mix_weights=mixing(2),
        ),
        2,
    ),
}


def ours(spec, block):
    """The same variant for `attend`, as a function of q, k, v."""
    spec = dict(spec)
    prefix = in_prefix(spec.pop("prefix")) if "prefix" in spec else None
    mask = Mask(spec.pop("kind", "causal"), spec.pop("segments", None), prefix)
    mix = {f"{n}_HxH": spec.pop(n) for n in ("mix_scores", "mix_weights") if n in spec}
    how = dict(mask=mask, variant=Variant(**spec, **mix))
    if block == "chunks":
        return functools.partial(attend_chunks, chunk=2, **how)
    return functools.partial(attend, block=block, **how)


@functools.cache
def value_and_pullback(name, block):
    """Output, and the gradients of <output, cotangent> for a fixed cotangent that is 0 where a query sees nothing."""
    spec, kv_heads = VARIANTS[name]
    cotangent = np.random.default_rng(9).normal(size=(B, T, H, K)).astype(np.float32)
    cotangent *= seeing(spec)

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(ours(spec, block), q, k, v)
        return out, pull(jnp.asarray(cotangent))

    return jax.device_get(run(*draws(kv_heads))), cotangent


def seeing(spec):
    """1 for queries that may see anything (padding may not), shaped [B, T, 1, 1]."""
    segments = spec.get("segments")
    return np.ones((B, T, 1, 1), np.float32) if segments is None else (segments > 0)[..., None, None]


@pytest.mark.parametrize("block", [None, 4, "chunks"], ids=["dense", "blocks", "chunks"])
@pytest.mark.parametrize("name", VARIANTS)
def test_attention_equals_brute_force(name, block):
    spec, kv_heads = VARIANTS[name]
    (out, _), _ = value_and_pullback(name, block)
    assert np.isfinite(out).all()  # a query that sees nothing must not give NaN
    expected = oracle.attention(*draws(kv_heads), **spec)
    where = np.broadcast_to(seeing(spec) > 0, out.shape)
    assert np.isfinite(expected[where]).all()
    np.testing.assert_allclose(out[where], expected[where], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_equal_finite_differences_of_brute_force(name):
    spec, kv_heads = VARIANTS[name]
    (_, grads), cotangent = value_and_pullback(name, 4)
    inputs = [x.astype(np.float64) for x in draws(kv_heads)]
    directions = [x.astype(np.float64) for x in draws(kv_heads, seed=5)]

    def value(epsilon):
        out = oracle.attention(*(x + epsilon * d for x, d in zip(inputs, directions, strict=True)), **spec)
        return np.nansum(out * cotangent)

    expected = (value(1e-5) - value(-1e-5)) / 2e-5
    got = sum(np.vdot(g, d) for g, d in zip(grads, directions, strict=True))
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("block", [4, "chunks"], ids=["blocks", "chunks"])
@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_equal_dense_in_values_and_gradients(name, block):
    spec, _ = VARIANTS[name]
    (dense, dense_grads), _ = value_and_pullback(name, None)
    (blocks, blocks_grads), _ = value_and_pullback(name, block)
    np.testing.assert_allclose(blocks * seeing(spec), dense * seeing(spec), atol=2e-6)
    for a, b in zip(blocks_grads, dense_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def visible(window, n, block, kind="causal"):
    """Which keys each query sees, read off attention itself: [n, n] booleans."""
    eye = jnp.eye(n)[None, :, None, :]  # values are one-hot, so the output of query t is its weights
    zero = jnp.zeros_like(eye)
    weights = jax.jit(functools.partial(attend, mask=Mask(kind), variant=Variant(window=window), block=block))
    weights = weights(zero, zero, eye)[0, :, 0]
    return np.asarray(weights) > 0


@pytest.mark.parametrize(("n", "w", "block"), [(16, 1, 4), (16, 5, 4), (16, 5, None), (24, 7, 5), (16, 16, 4)])
def test_a_band_has_wn_minus_half_w_w_minus_one_pairs(n, w, block):
    seen = visible(w, n, block)
    assert seen.sum() == w * n - w * (w - 1) // 2
    assert seen[n - 1].sum() == w and seen[n - 1, n - 1]


@pytest.mark.parametrize("w", [16, 17, 1000])
def test_a_window_as_wide_as_the_sequence_is_dense(w):
    assert (visible(w, 16, 4) == np.tril(np.ones((16, 16), bool))).all()


def test_density_of_the_gpt3_band_is_as_published():
    n, w = 2048, 256
    assert (w * n - w * (w - 1) / 2) / (n * (n + 1) / 2) == pytest.approx(0.234, abs=5e-4)
    assert visible(32, 256, 64).sum() / (256 * 257 / 2) == pytest.approx(
        (32 * 256 - 32 * 31 / 2) / (256 * 257 / 2), abs=1e-9
    )


def test_blocks_never_multiply_the_keys_that_the_mask_hides():
    def flops(window, block):
        x = jax.ShapeDtypeStruct((1, 256, 1, 16), jnp.float32)
        fn = jax.jit(lambda q, k, v: attend(q, k, v, Mask(), Variant(window=window), block=block))
        return fn.lower(x, x, x).compile().cost_analysis()["flops"]

    dense = flops(None, None)
    assert flops(None, 32) < 0.65 * dense  # (n + 1) / 2n of the pairs, by blocks
    assert flops(32, 32) < 0.3 * dense  # two blocks of keys for each block of queries


def test_dropout_draws_anew_for_every_block_of_queries_and_every_row():
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(2))
    zero, eye = jnp.zeros((2, 16, 1, 16)), jnp.broadcast_to(jnp.eye(16)[None, :, None], (2, 16, 1, 16))
    variant = Variant(dropout=0.5, keys_B=keys)
    weights = jax.jit(functools.partial(attend, mask=Mask("bidirectional"), variant=variant, block=4))
    kept = np.asarray(weights(zero, zero, eye)[:, :, 0]) > 0
    assert len({row.tobytes() for row in kept.reshape(32, 16)}) == 32
    assert kept.mean() == pytest.approx(0.5, abs=0.1)


def test_alibi_slopes_are_the_papers():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-h for h in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(16)[:3], [2**-0.5, 2**-1, 2**-1.5])
    np.testing.assert_allclose(alibi_slopes(12), oracle.slopes(12), rtol=1e-6)


def test_rope_products_depend_on_the_distance_only():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def product(m, n):
        a, b = (rotate(jnp.asarray(x), jnp.array([p]), 10000.0) for x, p in ((q, m), (k, n)))
        return float(jnp.vdot(a, b))

    for m, n in itertools.product([0, 3, 17], [0, 5, 40]):
        assert product(m, n) == pytest.approx(product(m + 100, n + 100), abs=1e-4)
    assert abs(product(3, 0) - product(4, 0)) > 1e-3
    assert product(0, 0) == pytest.approx(float(np.vdot(q, k)), abs=1e-5)


def test_rope_equals_complex_multiplication():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 0, 1], [7, 8, 9, 10, 11]])
    np.testing.assert_allclose(
        rotate(jnp.asarray(x), jnp.asarray(positions), 10000.0), oracle.rotary(x, positions, 10000.0), atol=1e-5
    )


def test_masks_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match=r"the kind of a mask is 'casual' \(did you mean 'causal'\?\)"):
        Mask("casual")
    with pytest.raises(UserError, match="a mask of kind 'prefix' needs prefix_BxT"):
        Mask("prefix")
    with pytest.raises(UserError, match="a mask of kind 'causal' takes no prefix_BxT"):
        Mask("causal", prefix_BxT=in_prefix(PREFIX))
