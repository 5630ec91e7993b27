"""losses.py against NumPy in float64 and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.losses import chunked_cross_entropy, cross_entropy

V, PADDED = 11, 16
OPTIONS = {
    "plain": dict(),
    "z_loss": dict(z_loss=0.1),
    "smoothing": dict(label_smoothing=0.2),
    "both": dict(z_loss=0.03, label_smoothing=0.1),
}


def draw(shape=(2, 5)):
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(*shape, PADDED)).astype(np.float32)
    logits[..., V:] = -1e30
    return logits, rng.integers(0, V, shape).astype(np.int32)


def expected(logits, targets, z_loss=0.0, label_smoothing=0.0):
    """The formulas, one token at a time, over the real columns only."""
    loss, nll = np.zeros(targets.shape), np.zeros(targets.shape)
    for at in np.ndindex(targets.shape):
        x = logits[at][:V].astype(np.float64)
        lse = x.max() + np.log(np.sum(np.exp(x - x.max())))
        q = np.full(V, label_smoothing / V)
        q[targets[at]] += 1 - label_smoothing
        loss[at] = -np.sum(q * (x - lse)) + z_loss * lse**2
        nll[at] = lse - x[targets[at]]
    return loss, nll


@pytest.mark.parametrize("name", OPTIONS)
def test_values_equal_numpy(name):
    logits, targets = draw()
    loss, nll = cross_entropy(logits, targets, vocab_size=V, **OPTIONS[name])
    want_loss, want_nll = expected(logits, targets, **OPTIONS[name])
    np.testing.assert_allclose(loss, want_loss, rtol=2e-6)
    np.testing.assert_allclose(nll, want_nll, rtol=2e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_equal_finite_differences(name):
    logits, targets = draw()
    weights = np.random.default_rng(1).normal(size=targets.shape)
    grad = jax.grad(lambda x: jnp.sum(weights * cross_entropy(x, targets, vocab_size=V, **OPTIONS[name])[0]))(logits)
    assert (grad[..., V:] == 0).all()
    for at in [(0, 0, 3), (1, 4, 0), (0, 2, int(targets[0, 2])), (1, 1, int(targets[1, 1]))]:
        values = []
        for sign in (1, -1):
            moved = logits.astype(np.float64)
            moved[at] += sign * 1e-5
            values.append(np.sum(weights * expected(moved, targets, **OPTIONS[name])[0]))
        assert grad[at] == pytest.approx((values[0] - values[1]) / 2e-5, abs=2e-6)


def test_the_plain_nll_carries_no_gradient():
    logits, targets = draw()
    assert (jax.grad(lambda x: cross_entropy(x, targets, z_loss=0.1)[1].sum())(logits) == 0).all()


def test_a_sure_and_right_prediction_costs_nothing_and_a_huge_logit_does_not_overflow():
    logits = jnp.array([[1e4, 0.0, -1e4]])
    loss, _ = cross_entropy(logits, jnp.array([0]))
    assert float(loss[0]) == 0.0
    assert float(cross_entropy(logits, jnp.array([1]))[0][0]) == 1e4
    grad = jax.grad(lambda x: cross_entropy(x, jnp.array([1]))[0].sum())(logits)
    np.testing.assert_allclose(grad, [[1.0, -1.0, 0.0]])


@pytest.mark.parametrize("chunk", [1, 4, 5, 10, 64])  # 10 tokens: chunks that divide them, that do not, and one of all
def test_chunks_give_what_the_whole_gives(chunk):
    rng = np.random.default_rng(2)
    hidden = rng.normal(size=(10, 6)).astype(np.float32)
    table = rng.normal(size=(V, 6)).astype(np.float32)
    targets, weights = rng.integers(0, V, 10).astype(np.int32), rng.uniform(size=10).astype(np.float32)

    def whole(hidden, table):
        loss, nll = cross_entropy(hidden @ table.T, targets, **OPTIONS["both"])
        return jnp.sum(weights * loss), nll

    def chunked(hidden, table):
        unembed = functools.partial(lambda table, h: h @ table.T, table)
        loss, nll = chunked_cross_entropy(unembed, hidden, targets, chunk=chunk, **OPTIONS["both"])
        return jnp.sum(weights * loss), nll

    (a, nll_a), grads_a = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))(hidden, table)
    (b, nll_b), grads_b = jax.value_and_grad(whole, argnums=(0, 1), has_aux=True)(hidden, table)
    assert float(a) == pytest.approx(float(b), rel=1e-6)
    np.testing.assert_allclose(nll_a, nll_b, rtol=1e-5, atol=1e-6)
    for x, y in zip(grads_a, grads_b, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_chunks_never_hold_all_logits():
    hidden, targets = jax.ShapeDtypeStruct((512, 4), jnp.float32), np.zeros(512, np.int32)

    def peak(chunk):
        def loss(h):
            return chunked_cross_entropy(lambda x: x @ jnp.ones((4, 1000)), h, targets, chunk=chunk)[0].sum()

        return jax.jit(jax.grad(loss)).lower(hidden).compile().memory_analysis().temp_size_in_bytes

    assert peak(16) < 0.25 * 512 * 1000 * 4 < peak(512)
