"""Functions whose derivative is written out, because the automatic one is slow on CPU or keeps arrays it does not need.

Each gives the numbers of the plain formula up to rounding; what it saves is said beside it and measured in docs/LOG.md.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax


def sum_leading(x: Array, ndim: int) -> Array:
    """Sums all but the trailing `ndim` axes, in float32.

    On CPU as a product with ones: XLA's own reduction over rows took a tenth of a train step.
    """
    axes = tuple(range(x.ndim - ndim))

    def product(x: Array) -> Array:
        ones = jnp.ones([x.shape[a] for a in axes], x.dtype)
        return lax.dot_general(ones, x, ((axes, axes), ((), ())), preferred_element_type=jnp.float32)

    return lax.platform_dependent(x, cpu=product, default=lambda x: jnp.sum(x, axes, dtype=jnp.float32))


@jax.custom_vjp
def multiply(x: Array, kernel: Array) -> Array:
    """x [..., in] @ kernel [in, *out].

    The kernel's gradient is made in its own layout; the automatic one is transposed, for kernels of several output
    axes by copying.
    """
    return _multiply(x, kernel)[0]


def _multiply(x, kernel):
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ()))), (x, kernel)


def _multiply_backward(residuals, g):
    x, kernel = residuals
    lead, out = tuple(range(x.ndim - 1)), tuple(range(x.ndim - 1, g.ndim))
    d_x = lax.dot_general(g, kernel, ((out, tuple(range(1, kernel.ndim))), ((), ())))
    return d_x, lax.dot_general(x, g, ((lead, lead), ((), ())))


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
    d_k_BxGxKxS = lax.dot_general(q, g, (((2, 3), (2, 3)), ((0, 1), (0, 1))))
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


def gelu_tanh(x: Array) -> Array:
    """GELU's tanh approximation (Hendrycks & Gimpel 2016); the backward pass computes it again from x."""
    return jax.checkpoint(partial(jax.nn.gelu, approximate=True))(x)
