"""Functions whose derivative is written out, because the automatic one is slow on CPU or keeps arrays it does not need.

Each gives the numbers of the plain formula up to rounding; what it saves is said beside it and measured in docs/LOG.md.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from gpt_jax.model.decoding import Transposed


def sum_leading(x: Array, ndim: int) -> Array:
    """Sums all but the trailing `ndim` axes, in float32.

    On CPU as a product with ones: XLA's own reduction over rows took a tenth of a train step.
    """
    axes = tuple(range(x.ndim - ndim))

    def product(x: Array) -> Array:
        ones = jnp.ones([x.shape[a] for a in axes], x.dtype)
        return lax.dot_general(ones, x, ((axes, axes), ((), ())), preferred_element_type=jnp.float32)

    return lax.platform_dependent(x, cpu=product, default=lambda x: jnp.sum(x, axes, dtype=jnp.float32))


def once(x: Array, ready: Array) -> Array:
    """x, read only once `ready`, of its shape, is there: for what a backward pass computes again, or copies.

    On CPU XLA starts whatever it can as soon as it can, and such arrays would wait from the forward pass on, beside
    those that they stand for. The comparison is true but for a slope that is no number.
    """
    return lax.platform_dependent(x, ready, cpu=lambda x, r: jnp.where(r == r, x, 0), default=lambda x, r: x)


@jax.custom_vjp
def multiply(x: Array, kernel: Array) -> Array:
    """x [..., in] @ kernel [in, *out].

    The kernel's gradient is made in its own layout; the automatic one is transposed, for kernels of several output
    axes by copying.
    """
    return _multiply(x, kernel)[0]


def _multiply(x, kernel):
    if isinstance(kernel, Transposed):
        return kernel.times(x), None
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ()))), (x, kernel)


def _multiply_backward(residuals, g):
    x, kernel = residuals
    return _input_slope(kernel, g), _kernel_slope(x, g)


def _input_slope(kernel, g):
    out = tuple(range(g.ndim - kernel.ndim + 1, g.ndim))
    return lax.dot_general(g, kernel, ((out, tuple(range(1, kernel.ndim))), ((), ())))


def _kernel_slope(x, g):
    lead = tuple(range(x.ndim - 1))
    return lax.dot_general(x, g, ((lead, lead), ((), ())))


multiply.defvjp(_multiply, _multiply_backward)


@jax.custom_vjp
def score(q_BxGxRxTxK: Array, k_BxGxSxK: Array) -> Array:
    """Products of queries and keys, [B, G, R, T, S] in float32.

    The gradient of the keys is made transposed, so that it is the queries that are copied and not the far larger
    gradient of the scores.
    """
    return _score(q_BxGxRxTxK, k_BxGxSxK)[0]


def _score(q, k):
    return lax.dot_general(q, k, (((4,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32), (q, k)


def _score_backward(residuals, g):
    q, k = residuals
    g = g.astype(q.dtype)
    d_q = lax.dot_general(g, k, (((4,), (2,)), ((0, 1), (0, 1))))
    d_k_BxGxKxS = lax.dot_general(once(q, d_q), g, (((2, 3), (2, 3)), ((0, 1), (0, 1))))
    return d_q, jnp.swapaxes(d_k_BxGxKxS, 2, 3)


score.defvjp(_score, _score_backward)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """x [..., *shape] + bias [*shape]."""
    return x + bias.astype(x.dtype)


add_bias.defvjp(
    lambda x, bias: (x + bias.astype(x.dtype), bias),
    lambda bias, g: (g, sum_leading(g, bias.ndim).astype(bias.dtype)),
)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(x: Array, scale: Array, bias: Array | None, epsilon: float, center: bool) -> Array:
    """LayerNorm (Ba et al. 2016) over the last axis, or without `center` RMSNorm (Zhang & Sennrich 2019); float32.

    Kept for the backward pass: x and two numbers a row.

    Args:
      x: [..., D]. scale: [D]. bias: [D] or None. epsilon: added to the variance. center: whether to subtract the mean.

    Returns:
      [..., D] float32.
    """
    return _normalize(x, scale, bias, epsilon, center)[0]


def _normalize(x, scale, bias, epsilon, center):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True) if center else jnp.zeros((), jnp.float32)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True) - jnp.square(mean)
    inverse = lax.rsqrt(jnp.maximum(variance, 0.0) + epsilon)
    y = (wide - mean) * (inverse * scale)
    return (y if bias is None else y + bias), (x, scale, bias, mean, inverse)


def _normalize_backward(epsilon, center, residuals, g):
    x, scale, bias, mean, inverse = residuals
    unit = (x.astype(jnp.float32) - mean) * inverse
    slope = g * scale
    along = slope - unit * jnp.mean(slope * unit, axis=-1, keepdims=True)
    if center:
        along = along - jnp.mean(slope, axis=-1, keepdims=True)
    d_scale = sum_leading(g * unit, 1).astype(scale.dtype)
    d_bias = None if bias is None else sum_leading(g, 1).astype(bias.dtype)
    return (inverse * along).astype(x.dtype), d_scale, d_bias


normalize.defvjp(_normalize, _normalize_backward)


@jax.custom_jvp
def softmax(x: Array) -> Array:
    """Over the last axis. Its derivative needs its value alone; that of `jax.nn.softmax` keeps two more arrays."""
    return jax.nn.softmax(x, axis=-1)


@softmax.defjvp
def _softmax_jvp(primals, tangents):
    y, (dx,) = softmax(*primals), tangents
    return y, y * (dx - jnp.sum(y * dx, axis=-1, keepdims=True))


@jax.custom_vjp
def softmax_product(scores_BxGxRxTxS: Array, v_BxGxSxK: Array) -> Array:
    """softmax(scores) @ values, [B, G, R, T, K] in the values' dtype.

    Kept for the backward pass: one array of the scores' size, the exponentials, where the automatic one keeps these and
    the weights too. The sum of weight times slope over the keys is that of output times slope over a head's size
    (FlashAttention, Dao et al. 2022, appendix B.2).
    """
    return _softmax_product(scores_BxGxRxTxS, v_BxGxSxK)[0]


def _softmax_product(scores, v):
    power = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    inverse = 1.0 / jnp.sum(power, axis=-1, keepdims=True)
    power = power.astype(v.dtype)
    dims = (((4,), (2,)), ((0, 1), (0, 1)))
    out = (lax.dot_general(power, v, dims, preferred_element_type=jnp.float32) * inverse).astype(v.dtype)
    return out, (power, inverse, v, out)


def _softmax_product_backward(residuals, g):
    power, inverse, v, out = residuals
    g = (g.astype(jnp.float32) * inverse).astype(v.dtype)
    along = jnp.sum(g.astype(jnp.float32) * out, axis=-1, keepdims=True)
    d_v_BxGxKxS = lax.dot_general(g, power, (((2, 3), (2, 3)), ((0, 1), (0, 1))))  # transposed, as in `score`
    v_BxGxKxS = once(jnp.swapaxes(v, 2, 3), d_v_BxGxKxS)
    d_power = lax.dot_general(g, v_BxGxKxS, (((4,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
    return power * (d_power - along), jnp.swapaxes(d_v_BxGxKxS, 2, 3)


softmax_product.defvjp(_softmax_product, _softmax_product_backward)


def gelu_tanh(x: Array) -> Array:
    """GELU's tanh approximation (Hendrycks & Gimpel 2016); the backward pass computes it again from x."""
    return jax.checkpoint(partial(jax.nn.gelu, approximate=True))(x)


@jax.custom_vjp
def multiply_gelu(x: Array, kernel: Array) -> Array:
    """gelu_tanh(x) @ kernel, x [..., in] and kernel [in, *out].

    Kept for the backward pass: x alone. It computes GELU again, as x sigmoid(2 z), which is 0.5 x (1 + tanh(z)).
    """
    return _multiply_gelu(x, kernel)[0]


def _multiply_gelu(x, kernel):
    return _multiply(jax.nn.gelu(x, approximate=True), kernel)[0], (x, kernel)


def _multiply_gelu_backward(residuals, g):
    x, kernel = residuals
    d_h, c = _input_slope(kernel, g), 2.0 * (2.0 / jnp.pi) ** 0.5
    wide, square = x.astype(jnp.float32), jnp.square(once(x, d_h).astype(jnp.float32))
    gate = jax.nn.sigmoid(c * wide * (1.0 + 0.044715 * square))
    slope = gate + wide * gate * (1.0 - gate) * (c * (1.0 + 3.0 * 0.044715 * square))
    return (d_h * slope).astype(d_h.dtype), _kernel_slope((wide * gate).astype(g.dtype), g)


multiply_gelu.defvjp(_multiply_gelu, _multiply_gelu_backward)
