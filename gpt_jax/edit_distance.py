"""Edit distance: Levenshtein as a metric, a differentiable soft one, and minimum risk from samples.

The distance of predictions P (a distribution per position) to targets y, with C_ij the cost of reading position i as
target j, is the recursion of Levenshtein with a soft minimum (as Cuturi and Blondel 2017 do for time warping):

    D_i0 = i deletion,  D_0j = j insertion,
    D_ij = smin(D_{i-1,j} + deletion, D_{i,j-1} + insertion, D_{i-1,j-1} + C_ij),
    smin(a) = -gamma logsumexp(-a / gamma).

So D_mn = -gamma ln sum over alignments e^{-cost / gamma}, its gradient with respect to C is the expected alignment, and
D_hard - gamma ln Delannoy(m, n) <= D_mn <= D_hard. With C_ij = 1 - P_i(y_j) the hard distance on these expected costs
is at least the expected Levenshtein distance of samples (Jensen). Its gradient is proportional to p(1 - p): about 0
where the model is surely wrong, so never train on it alone.

Where tokens are replaced in place, each independently of the others, Levenshtein is the number of wrong tokens (figures
in docs/RESULTS.md). The distance has something of its own to say on spans and on continuations of unequal length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gpt_jax.errors import UserError, choose
from gpt_jax.model.random import fold_name

BIG = 1e9  # a cost that no alignment pays: finite, so that gradients are
COSTS = ("probability", "nll")


def levenshtein(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Returns the least number of deletions, insertions and replacements that make `a` into `b`.

    Args:
      a, b: sequences of anything that can be compared, on the host: text, lists of words, arrays of ids.
    """
    numbers: dict[Any, int] = {}
    left, right = (np.array([numbers.setdefault(x, len(numbers)) for x in _plain(s)], np.int64) for s in (a, b))
    at = np.arange(len(right) + 1)
    row = at
    for i, token in enumerate(left, 1):
        row = np.concatenate([[i], np.minimum(row[1:] + 1, row[:-1] + (right != token))])
        row = np.minimum.accumulate(row - at) + at  # insertions: row[j] = min over k <= j of row[k] + j - k
    return int(row[-1])


def _plain(sequence: Any) -> Sequence[Any]:
    return sequence.tolist() if isinstance(sequence, (np.ndarray, jax.Array)) else sequence


def hard_edit_distance(a_BxM: Array, b_BxN: Array, m_B: Array, n_B: Array) -> Array:
    """Levenshtein distance of the first m tokens of each row of `a` to the first n of the same row of `b`.

    Args:
      a_BxM, b_BxN: integers; what stands after the lengths has no effect.
      m_B, n_B: lengths, 0 to M and 0 to N.

    Returns:
      int32 [B].
    """
    at = jnp.arange(b_BxN.shape[1] + 1, dtype=jnp.int32)
    B = a_BxM.shape[0]

    def step(row, xs):
        i, token_B = xs
        best = jnp.minimum(row[:, 1:] + 1, row[:, :-1] + (b_BxN != token_B[:, None]))
        best = jnp.concatenate([jnp.full((B, 1), i), best], axis=1)
        best = lax.cummin(best - at, axis=1) + at
        return jnp.where((i <= m_B)[:, None], best, row), None

    first = jnp.broadcast_to(at, (B, len(at)))
    row, _ = lax.scan(step, first, (jnp.arange(1, a_BxM.shape[1] + 1, dtype=jnp.int32), a_BxM.T))
    return jnp.take_along_axis(row, n_B[:, None], axis=1)[:, 0]


def mismatch_costs(
    logits_BxMxV: Array, targets_BxN: Array, *, cost: str = "probability", clip: float = math.inf
) -> Array:
    """What it costs to read position i as target j, [B, M, N].

    Args:
      logits_BxMxV: of each position. targets_BxN: integers.
      cost: 'probability': C_ij = 1 - P_i(y_j); 'nll': C_ij = min(-log P_i(y_j), clip), in nats. Unclipped, and with
        deletion and insertion infinite, the second makes the soft edit distance the cross-entropy.
      clip: the largest 'nll', so that one impossible token does not outweigh all others.
    """
    choose("the cost of a replacement", cost, COSTS)
    lse_BxM = jax.nn.logsumexp(logits_BxMxV, axis=-1)
    # Whole columns are gathered: the gradient then adds rows of M numbers and not single ones.
    columns_BxNxM = jnp.take_along_axis(jnp.swapaxes(logits_BxMxV, 1, 2), targets_BxN[:, :, None], axis=1)
    log_p = jnp.swapaxes(columns_BxNxM, 1, 2) - lse_BxM[:, :, None]
    return 1.0 - jnp.exp(log_p) if cost == "probability" else jnp.minimum(-log_p, clip)


def soft_edit_distance(
    costs_BxMxN: Array,
    m_B: Array,
    n_B: Array,
    *,
    gamma: float = 0.1,
    deletion: float | Array = 1.0,
    insertion: float | Array = 1.0,
) -> Array:
    """Soft edit distance of m positions to n targets, by anti-diagonals (the recursion of the module's docstring).

    Args:
      costs_BxMxN: the cost C_ij of reading position i as target j; what stands outside [m, n] has no effect and no
        gradient. M and N are at least 1.
      m_B, n_B: lengths of each row, from 0 on.
      gamma: softness, in units of cost; 0 is the hard minimum (with a subgradient). At 1 the many alignments of long
        sequences dominate: a sequence of 64 tokens is at about -24 of itself. At 0.1 or less, at about 0.
      deletion, insertion: cost of leaving a position out, of a target that no position gave. Infinite: positions and
        targets are paired in place, D = sum_i C_ii for every gamma; m and n must then be equal.

    Returns:
      [B], in units of cost, of the costs' dtype.

    Raises:
      UserError: gamma is negative.
    """
    if gamma < 0:
        raise UserError(f"gamma is {gamma}; a soft edit distance needs 0 (hard) or more.")
    B, M, N = costs_BxMxN.shape
    deletion, insertion = jnp.minimum(deletion, BIG), jnp.minimum(insertion, BIG)
    inside = (jnp.arange(M)[:, None] < m_B[:, None, None]) & (jnp.arange(N) < n_B[:, None, None])
    costs = jnp.where(inside, costs_BxMxN, 0.0)
    # Rows of M + N read as rows of M + N - 1 move row i right by i: column d - 2 is then the diagonal i + j = d.
    skewed = jnp.pad(costs, ((0, 0), (0, 0), (0, M))).reshape(B, -1)[:, : M * (M + N - 1)].reshape(B, M, M + N - 1)
    slot = jnp.arange(M + 1)  # a diagonal d holds D_{i, d - i} in slot i

    def shift(x_BxS):
        return jnp.pad(x_BxS, ((0, 0), (1, 0)), constant_values=BIG)

    def borders(diagonal, d):
        outside = (slot > d) | (slot < d - N)
        diagonal = jnp.where(slot == 0, d * insertion, jnp.where(slot == d, d * deletion, diagonal))
        return jnp.where(outside, BIG, diagonal).astype(costs.dtype)

    def step(carry, xs):
        before, last = carry
        d, costs_BxM = xs
        diagonal = _softmin(shift(last[:, :-1]) + deletion, last + insertion, shift(before[:, :-1] + costs_BxM), gamma)
        diagonal = borders(diagonal, d)
        return (last, diagonal), diagonal

    zero = jnp.where(slot == 0, 0.0, jnp.full((B, M + 1), BIG, costs.dtype))
    one = borders(zero, 1)
    d = jnp.arange(2, M + N + 1)
    _, rest = lax.scan(step, (zero, one), (d, jnp.moveaxis(skewed, 2, 0)))
    diagonals = jnp.concatenate([zero[None], one[None], rest])
    return diagonals[m_B + n_B, jnp.arange(B), m_B]


def _softmin(a: Array, b: Array, c: Array, gamma: float) -> Array:
    least = jnp.minimum(jnp.minimum(a, b), c)
    if gamma == 0:
        return least
    least = lax.stop_gradient(least)
    return least - gamma * jnp.log(sum(jnp.exp((least - x) / gamma) for x in (a, b, c)))


def mean_edit_distance(
    costs_BxMxN: Array, m_B: Array, n_B: Array, *, gamma: float = 0.1, deletion: float = 1.0, insertion: float = 1.0
) -> Array:
    """Mean cost of alignments that have probability ~ e^{-cost / gamma} (Ofitserov et al. 2019).

    At least the hard distance, where `soft_edit_distance` is at most that. It is the derivative of the soft distance as
    all costs grow together (Euler). Arguments and result as `soft_edit_distance`.
    """
    deletion, insertion = min(deletion, BIG), min(insertion, BIG)

    def scaled(factor):
        prices = dict(deletion=factor * deletion, insertion=factor * insertion)
        return soft_edit_distance(factor * costs_BxMxN, m_B, n_B, gamma=gamma, **prices)

    one = jnp.ones((), costs_BxMxN.dtype)
    return jax.jvp(scaled, (one,), (one,))[1]


def edit_divergence(
    logits_BxMxV: Array,
    targets_BxN: Array,
    m_B: Array,
    n_B: Array,
    *,
    gamma: float = 0.1,
    deletion: float = 1.0,
    insertion: float = 1.0,
) -> Array:
    """D(P, Y) - D(P, P) / 2 - D(Y, Y) / 2 (Blondel et al. 2021): 0 where P is surely Y, whatever gamma. [B].

    Costs are the probability that two draws differ: 1 - P_i(y_j), 1 - P_i . P_j, [y_i != y_j]. With infinite indels it
    is half of the Brier score, sum_i |P_i - y_i|^2 / 2.
    """
    prices = dict(gamma=gamma, deletion=deletion, insertion=insertion)
    p = jax.nn.softmax(logits_BxMxV, axis=-1)
    crossed = soft_edit_distance(mismatch_costs(logits_BxMxV, targets_BxN), m_B, n_B, **prices)
    own = soft_edit_distance(1.0 - jnp.einsum("bmv,bnv->bmn", p, p), m_B, m_B, **prices)
    differ = (targets_BxN[:, :, None] != targets_BxN[:, None, :]).astype(p.dtype)
    return crossed - own / 2 - soft_edit_distance(differ, n_B, n_B, **prices) / 2


# --- minimum risk: the gradient of an expected distance from samples --------------------------------------------------


def leave_one_out(values_BxK: Array) -> Array:
    """Each value less the mean of the other samples' (RLOO; Kool et al. 2019), [B, K]; K is at least 2."""
    K = values_BxK.shape[1]
    return (values_BxK - jnp.mean(values_BxK, axis=1, keepdims=True)) * (K / (K - 1))


def risk(log_probs_BxK: Array, distances_BxK: Array) -> Array:
    """The mean distance of K samples; its gradient estimates that of the expected distance, without bias.

    The gradient is mean_k advantage_k grad log p(z_k), with advantage the distance left one out.

    Args:
      log_probs_BxK: log p of each whole sample. distances_BxK: of each sample, smaller is better; K is at least 2.

    Returns:
      [B].

    Raises:
      UserError: fewer than two samples.
    """
    if distances_BxK.shape[1] < 2:
        raise UserError(f"minimum risk has {distances_BxK.shape[1]} sample; leaving one out needs at least 2.")
    distances = lax.stop_gradient(distances_BxK.astype(log_probs_BxK.dtype))
    surrogate = jnp.mean(leave_one_out(distances) * log_probs_BxK, axis=1)
    return jnp.mean(distances, axis=1) + surrogate - lax.stop_gradient(surrogate)


def minimum_risk(
    logits_BxMxV: Array, targets_BxN: Array, m_B: Array, n_B: Array, keys_B: Array, *, samples: int = 8
) -> Array:
    """Expected Levenshtein distance of sequences drawn position by position, estimated from samples. [B].

    Args:
      logits_BxMxV: of each position, m of them used. targets_BxN: n of them used.
      keys_B: a random key per row. samples: per row.

    Returns:
      The mean distance of the samples, with the gradient of `risk`.
    """
    draw = jax.vmap(lambda key, logits: jax.random.categorical(key, logits, shape=(samples, logits.shape[0])))
    z_BxKxM = draw(fold_name(keys_B, "minimum_risk"), lax.stop_gradient(logits_BxMxV))
    chosen = jnp.take_along_axis(logits_BxMxV, jnp.swapaxes(z_BxKxM, 1, 2), axis=-1)
    log_p_BxMxK = chosen - jax.nn.logsumexp(logits_BxMxV, axis=-1, keepdims=True)
    used = jnp.arange(logits_BxMxV.shape[1])[:, None] < m_B[:, None, None]
    distances = jax.vmap(lambda z: hard_edit_distance(z, targets_BxN, m_B, n_B), in_axes=1, out_axes=1)(z_BxKxM)
    return risk(jnp.sum(jnp.where(used, log_p_BxMxK, 0.0), axis=1), distances)
