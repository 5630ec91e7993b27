"""Derivatives written out by hand, against finite differences in float64 NumPy, and what they keep in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.model.derivatives import (
    add_bias,
    gelu_tanh,
    multiply,
    multiply_gelu,
    normalize,
    once,
    score,
    softmax,
    softmax_product,
    sum_leading,
)

RNG = np.random.default_rng(0)
X, SCALE, BIAS = RNG.normal(1, 2, (5, 3, 8)), RNG.normal(1, 0.3, 8), RNG.normal(0, 0.3, 8)


def plain_normalize(x, scale, bias=None, *, center):
    mean = x.mean(-1, keepdims=True) if center else 0.0
    spread = np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5)
    return (x - mean) / spread * scale + (0.0 if bias is None else bias)


def plain_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def plain_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


# name -> (ours, NumPy's, arguments)
FUNCTIONS = {
    "layernorm": (
        lambda x, s, b: normalize(x, s, b, 1e-5, True),
        lambda *a: plain_normalize(*a, center=True),
        (X, SCALE, BIAS),
    ),
    "layernorm_without_bias": (
        lambda x, s: normalize(x, s, None, 1e-5, True),
        lambda *a: plain_normalize(*a, center=True),
        (X, SCALE),
    ),
    "rmsnorm": (
        lambda x, s: normalize(x, s, None, 1e-5, False),
        lambda *a: plain_normalize(*a, center=False),
        (X, SCALE),
    ),
    "multiply": (multiply, lambda x, w: np.einsum("btd,dhk->bthk", x, w), (X, RNG.normal(size=(8, 2, 4)))),
    "score": (
        score,
        lambda q, k: np.einsum("bgrtk,bgsk->bgrts", q, k),
        (RNG.normal(size=(2, 2, 3, 2, 4)), RNG.normal(size=(2, 2, 5, 4))),
    ),
    "add_bias": (add_bias, np.add, (X, RNG.normal(size=(3, 8)))),
    "softmax": (softmax, plain_softmax, (X,)),
    "gelu_tanh": (gelu_tanh, plain_gelu, (X,)),
    "multiply_gelu": (
        multiply_gelu,
        lambda x, w: np.einsum("btd,dhk->bthk", plain_gelu(x), w),
        (X, RNG.normal(size=(8, 2, 4))),
    ),
    "softmax_product": (
        softmax_product,
        lambda x, v: np.einsum("bgrts,bgsk->bgrtk", plain_softmax(x), v),
        (3 * RNG.normal(size=(2, 2, 3, 2, 5)), RNG.normal(size=(2, 2, 5, 4))),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_derivatives_equal_numpys(name):
    ours, plain, args = FUNCTIONS[name]
    rng = np.random.default_rng(1)
    directions = [rng.normal(size=a.shape) for a in args]
    out, pullback = jax.vjp(ours, *(jnp.asarray(a, jnp.float32) for a in args))
    np.testing.assert_allclose(out, plain(*args), atol=1e-5)
    g = rng.normal(size=out.shape)
    for i, direction in enumerate(directions):
        near = [plain(*args[:i], args[i] + e * direction, *args[i + 1 :]) for e in (1e-6, -1e-6)]
        expected = np.vdot(g, (near[0] - near[1]) / 2e-6)
        got = np.vdot(pullback(jnp.asarray(g, jnp.float32))[i], direction)
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-4), i


@pytest.mark.parametrize("name", ["layernorm", "rmsnorm", "softmax", "gelu_tanh", "multiply_gelu", "softmax_product"])
def test_one_array_of_the_inputs_size_is_kept_for_the_backward_pass(name):
    ours, _, args = FUNCTIONS[name]
    _, pullback = jax.vjp(ours, *(jnp.asarray(a, jnp.float32) for a in args))
    assert sum(leaf.size == args[0].size for leaf in jax.tree.leaves(pullback)) == 1


def test_what_waits_for_a_slope_is_itself():
    x, ready = jnp.asarray(X, jnp.float32), jnp.full(X.shape, jnp.inf)
    np.testing.assert_array_equal(once(x, ready), x)


def test_on_cpu_a_layer_of_gelu_holds_one_array_of_its_width_until_the_backward_pass():
    rows, width = 512, 256

    def memory(layers):
        def loss(params):
            x = jnp.ones((rows, width // 4))
            for up, down in params:
                x = x + multiply_gelu(multiply(x, up), down)
            return jnp.sum(x)

        shape = [(jax.ShapeDtypeStruct(s, jnp.float32)) for s in ((width // 4, width), (width, width // 4))]
        compiled = jax.jit(jax.grad(loss)).lower([shape] * layers).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    a_layer = (memory(12) - memory(4)) / 8
    assert a_layer < 1.9 * 4 * rows * width  # that array, x, and the rest; two of them would be more


@pytest.mark.parametrize("ndim", [0, 1, 2])
def test_leading_axes_are_summed_in_float32(ndim):
    x = RNG.normal(size=(300, 4, 6))
    axes = tuple(range(3 - ndim))
    np.testing.assert_allclose(sum_leading(jnp.asarray(x, jnp.float32), ndim), x.sum(axes), rtol=1e-5, atol=1e-4)
    half = jnp.full((4096, 2, 2), 1.0, jnp.bfloat16)  # a bfloat16 sum would stop at 256
    np.testing.assert_array_equal(sum_leading(half, 2), np.full((2, 2), 4096.0))
