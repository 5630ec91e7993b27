"""edit_distance.py against enumeration of all alignments, a textbook table, closed forms and finite differences."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.edit_distance import (
    edit_divergence,
    hard_edit_distance,
    leave_one_out,
    levenshtein,
    mean_edit_distance,
    minimum_risk,
    mismatch_costs,
    risk,
    soft_edit_distance,
)
from gpt_jax.errors import UserError

KNOWN = [
    ("kitten", "sitting", 3),
    ("intention", "execution", 5),
    ("saturday", "sunday", 3),
    ("", "abc", 3),
    ("abc", "", 3),
    ("", "", 0),
    ("abc", "abc", 0),
    ("abcd", "bcda", 2),
]


def table(a, b):
    """The textbook table, cell by cell."""
    D = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
        D[i][j] = min(D[i - 1][j] + 1, D[i][j - 1] + 1, D[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return D[len(a)][len(b)]


@functools.cache
def alignments(m, n):
    """Every alignment of m positions to n targets, each as (deletions, insertions, pairs)."""
    if m == n == 0:
        return [(0, 0, ())]
    out = [(d + 1, i, pairs) for d, i, pairs in alignments(m - 1, n)] if m else []
    out += [(d, i + 1, pairs) for d, i, pairs in alignments(m, n - 1)] if n else []
    out += [(d, i, (*pairs, (m - 1, n - 1))) for d, i, pairs in alignments(m - 1, n - 1)] if m and n else []
    return out


def enumerated(costs, gamma, deletion=1.0, insertion=1.0):
    """(soft distance, expected alignment [m, n], mean cost, least cost) by summing over alignments, float64."""
    m, n = costs.shape
    paths = alignments(m, n)
    total = np.array([d * deletion + i * insertion + sum(costs[p] for p in pairs) for d, i, pairs in paths])
    weight = np.exp(-(total - total.min()) / gamma)
    probability = weight / weight.sum()
    expected = np.zeros((m, n))
    for (_, _, pairs), p in zip(paths, probability, strict=True):
        for pair in pairs:
            expected[pair] += p
    return total.min() - gamma * np.log(weight.sum()), expected, float(probability @ total), total.min()


def delannoy(m, n):
    return sum(math.comb(m, k) * math.comb(n, k) * 2**k for k in range(min(m, n) + 1))


def padded(costs, M=6, N=7, fill=np.nan):
    """One matrix in the corner of a larger one, with its lengths, as a batch of one."""
    out = np.full((1, M, N), fill, costs.dtype)
    out[0, : costs.shape[0], : costs.shape[1]] = costs
    return out, np.array([costs.shape[0]]), np.array([costs.shape[1]])


def random_pairs(count=300, longest=12, vocab=4, seed=0):
    """Padded random sequences and their lengths, the empty one among them; padding repeats real tokens."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, vocab, (2, count, longest)).astype(np.int32)
    m, n = rng.integers(0, longest + 1, (2, count)).astype(np.int32)
    return a, b, m, n


# --- the hard distance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b", "distance"), KNOWN)
def test_known_distances(a, b, distance):
    assert levenshtein(a, b) == levenshtein(b, a) == distance == table(a, b)


def test_words_and_arrays_are_sequences_too():
    assert levenshtein(["the", "cat", "sat"], ["the", "dog", "sat", "down"]) == 2
    assert levenshtein(np.array([1, 2, 3]), jnp.array([2, 3])) == 1


def test_batched_distances_equal_the_textbook_table_on_300_random_pairs():
    a, b, m, n = random_pairs()
    got = jax.jit(hard_edit_distance)(a, b, m, n)
    want = [table(a[i, : m[i]].tolist(), b[i, : n[i]].tolist()) for i in range(len(m))]
    assert got.dtype == jnp.int32 and got.tolist() == want
    assert [levenshtein(a[i, : m[i]], b[i, : n[i]]) for i in range(len(m))] == want


def test_without_softness_the_soft_distance_is_the_hard_one_on_300_random_pairs():
    a, b, m, n = random_pairs(seed=1)
    costs = (a[:, :, None] != b[:, None, :]).astype(np.float32)
    got = jax.jit(functools.partial(soft_edit_distance, gamma=0))(costs, m, n)
    assert got.tolist() == [table(a[i, : m[i]].tolist(), b[i, : n[i]].tolist()) for i in range(len(m))]


# --- the soft distance ------------------------------------------------------------------------------------------------

SIZES = [(1, 1), (3, 4), (4, 3), (4, 4), (0, 3), (2, 0), (0, 0), (1, 5)]


@pytest.mark.parametrize("gamma", [0.05, 0.3, 1.0])
def test_value_gradient_and_mean_equal_the_sums_over_all_alignments(gamma):
    prices = dict(gamma=gamma, deletion=0.7, insertion=1.2)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        value = jax.jit(functools.partial(soft_edit_distance, **prices))
        gradient = jax.jit(jax.grad(lambda c, m, n: soft_edit_distance(c, m, n, **prices)[0]))
        mean = jax.jit(functools.partial(mean_edit_distance, **prices))
        for m, n in SIZES:
            costs = rng.uniform(size=(m, n))
            soft, expected, gibbs, least = enumerated(costs, gamma, 0.7, 1.2)
            batch = padded(costs)
            assert len(alignments(m, n)) == delannoy(m, n)
            assert value(*batch)[0] == pytest.approx(soft, abs=1e-12)
            assert mean(*batch)[0] == pytest.approx(gibbs, abs=1e-12)
            got = np.asarray(gradient(*batch))[0]
            np.testing.assert_allclose(got[:m, :n], expected, atol=1e-12)
            assert (got[m:] == 0).all() and (got[:, n:] == 0).all()  # padding, though it is NaN
            assert least - gamma * math.log(delannoy(m, n)) - 1e-12 <= soft <= least + 1e-12 <= gibbs + 2e-12


def test_gradient_equals_finite_differences():
    costs, m, n = padded(np.random.default_rng(1).uniform(size=(5, 4)), fill=0.0)
    with jax.enable_x64(True):
        value = jax.jit(lambda c: soft_edit_distance(c, m, n, gamma=0.2)[0])
        got = np.asarray(jax.grad(value)(costs))
        for at in itertools.product([0], range(5), range(4)):
            up, down = costs.copy(), costs.copy()
            up[at] += 1e-5
            down[at] -= 1e-5
            assert got[at] == pytest.approx(float(value(up) - value(down)) / 2e-5, abs=1e-9)


def test_the_hard_gradient_is_an_optimal_alignment():
    costs = np.random.default_rng(2).uniform(size=(4, 5))  # no ties
    _, expected, _, least = enumerated(costs, 1e-4)
    batch = padded(costs.astype(np.float32))
    value, grad = jax.jit(jax.value_and_grad(lambda c: soft_edit_distance(c, *batch[1:], gamma=0)[0]))(batch[0])
    assert float(value) == pytest.approx(least, rel=1e-6)
    np.testing.assert_array_equal(grad[0, :4, :5], expected.round(6))


@pytest.mark.parametrize("gamma", [0, 0.1, 1.0, 10.0])
def test_infinite_indels_pair_in_place_for_every_gamma(gamma):
    rng = np.random.default_rng(3)
    logits, targets = rng.normal(size=(2, 5, 7)).astype(np.float32), rng.integers(0, 7, (2, 5))
    lengths = np.array([5, 3])
    used = np.arange(5) < lengths[:, None]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_p = np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    prices = dict(gamma=gamma, deletion=math.inf, insertion=math.inf)

    got = soft_edit_distance(mismatch_costs(logits, targets), lengths, lengths, **prices)
    np.testing.assert_allclose(got, np.where(used, 1 - np.exp(log_p), 0).sum(1), rtol=1e-5)

    def distance(logits):
        return soft_edit_distance(mismatch_costs(logits, targets, cost="nll"), lengths, lengths, **prices).sum()

    value, grad = jax.jit(jax.value_and_grad(distance))(logits)  # the cross-entropy, and its gradient p - onehot
    assert float(value) == pytest.approx(-log_p[used].sum(), rel=1e-5)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(grad, np.where(used[..., None], p - np.eye(7)[targets], 0), atol=1e-5)


def test_costs_are_one_minus_p_or_the_clipped_nll_of_every_target_at_every_position():
    rng = np.random.default_rng(4)
    logits, targets = 2 * rng.normal(size=(2, 3, 6)).astype(np.float32), rng.integers(0, 6, (2, 4))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.array([[[p[b, i, targets[b, j]] for j in range(4)] for i in range(3)] for b in range(2)])
    np.testing.assert_allclose(mismatch_costs(logits, targets), 1 - chosen, atol=1e-6)
    np.testing.assert_allclose(
        mismatch_costs(logits, targets, cost="nll", clip=2.0), np.minimum(-np.log(chosen), 2.0), rtol=1e-5
    )
    with pytest.raises(UserError, match=r"'probabilty' \(did you mean 'probability'\?\)"):
        mismatch_costs(logits, targets, cost="probabilty")
    with pytest.raises(UserError, match=r"gamma is -1"):
        soft_edit_distance(np.zeros((1, 1, 1)), np.ones(1, int), np.ones(1, int), gamma=-1)


def test_the_gradient_of_one_minus_p_vanishes_where_the_model_is_sure():
    logit = np.array([-12.0, -3.0, 0.0, 3.0], np.float32)  # of a binary choice: d(1 - p)/dlogit = -p (1 - p)
    one = np.ones(4, int)

    def distance(logit):
        logits = jnp.stack([logit, jnp.zeros(4)], axis=-1)[:, None]
        return soft_edit_distance(mismatch_costs(logits, jnp.zeros((4, 1), int)), one, one).sum()

    p = 1 / (1 + np.exp(-logit))
    # Deletion and insertion together cost 2: at gamma = 0.1 they take almost no part.
    np.testing.assert_allclose(jax.jit(jax.grad(distance))(logit), -p * (1 - p), rtol=1e-3)


@pytest.mark.parametrize("gamma", [0, 0.01, 0.1, 1.0])
def test_long_rows_give_finite_values_and_no_gradient_on_padding(gamma):
    rng = np.random.default_rng(5)
    logits, targets = 3 * rng.normal(size=(16, 128, 50)).astype(np.float32), rng.integers(0, 50, (16, 128))
    m, n = rng.integers(0, 129, (2, 16))
    m[0], n[0], m[1], n[1] = 128, 128, 0, 128

    def distance(logits):
        out = soft_edit_distance(mismatch_costs(logits, targets), m, n, gamma=gamma)
        return out.sum(), out

    (_, values), grad = jax.jit(jax.value_and_grad(distance, has_aux=True))(logits)
    assert np.isfinite(values).all() and np.isfinite(grad).all()
    assert float(values[1]) == 128.0
    used = np.arange(128) < m[:, None]
    assert (grad[~used] == 0).all() and (np.abs(grad).sum(-1)[used].max() > 1e-3)
    # The content of the padding changes no bit.
    other = np.where(used[..., None], logits, 7.0)
    assert (np.asarray(jax.jit(distance)(other)[1]) == np.asarray(jax.jit(distance)(logits)[1])).all()


def test_at_gamma_one_a_sequence_is_far_below_zero_from_itself_and_at_a_tenth_it_is_not():
    costs = 1 - np.eye(64, dtype=np.float32)[None]
    length = np.array([64])
    at = {gamma: float(soft_edit_distance(costs, length, length, gamma=gamma)[0]) for gamma in (1.0, 0.1, 0.05)}
    assert at[1.0] == pytest.approx(-23.9, abs=0.05)
    assert -1e-3 < at[0.1] <= 0 and -1e-3 < at[0.05] <= 0


@pytest.mark.parametrize("gamma", [0.1, 1.0])
def test_the_divergence_is_zero_at_the_targets_and_half_the_brier_score_without_indels(gamma):
    rng = np.random.default_rng(6)
    targets = rng.integers(0, 5, (2, 8))
    m = np.array([8, 6])
    sure = 50.0 * np.eye(5, dtype=np.float32)[targets]
    np.testing.assert_allclose(edit_divergence(sure, targets, m, m, gamma=gamma), 0, atol=1e-5)
    logits = rng.normal(size=(2, 8, 5)).astype(np.float32)
    assert (np.asarray(edit_divergence(logits, targets, m, m, gamma=gamma)) > 0.5).all()
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    brier = ((p - np.eye(5)[targets]) ** 2).sum(-1) * (np.arange(8) < m[:, None])
    got = edit_divergence(logits, targets, m, m, gamma=gamma, deletion=math.inf, insertion=math.inf)
    np.testing.assert_allclose(got, brier.sum(1) / 2, rtol=1e-4)


# --- expectations over samples ----------------------------------------------------------------------------------------


def expected_distance(logits, target):
    """E[Lev(z, y)] for z drawn position by position, by enumeration; differentiable, [m, V] -> scalar."""
    m, V = logits.shape
    everything = np.array(list(itertools.product(range(V), repeat=m)))
    distances = np.array([table(z.tolist(), list(target)) for z in everything])
    log_p = jax.nn.log_softmax(logits)[np.arange(m), everything].sum(1)
    return jnp.exp(log_p) @ distances


def test_the_hard_distance_on_expected_costs_is_at_least_the_expected_distance():
    rng = np.random.default_rng(7)
    logits = 2 * rng.normal(size=(20, 4, 3)).astype(np.float32)
    targets, n = rng.integers(0, 3, (20, 5)), rng.integers(2, 6, 20)
    hard = soft_edit_distance(mismatch_costs(logits, targets), np.full(20, 4), n, gamma=0)
    gaps = [float(hard[i]) - float(expected_distance(logits[i], targets[i, : n[i]])) for i in range(20)]
    assert min(gaps) > -1e-5 and max(gaps) > 0.05  # and not always equal


def test_leave_one_out_subtracts_the_mean_of_the_others():
    values = np.random.default_rng(8).normal(size=(3, 5))
    want = [[row[k] - np.delete(row, k).mean() for k in range(5)] for row in values]
    np.testing.assert_allclose(leave_one_out(values), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="has 1 sample"):
        risk(jnp.zeros((3, 1)), jnp.ones((3, 1)))


def test_equal_distances_give_no_gradient():
    grad = jax.grad(lambda x: risk(x, jnp.full((2, 4), 3.0)).sum())(jnp.ones((2, 4)))
    assert (grad == 0).all()


@pytest.mark.parametrize("target", [(0, 1, 2), (1, 0)], ids=["equal length", "shorter"])
def test_minimum_risk_estimates_the_enumerated_gradient_without_bias(target):
    rows, logits = 20_000, np.random.default_rng(9).normal(size=(3, 3)).astype(np.float32)
    exact, gradient = jax.value_and_grad(expected_distance)(logits, target)
    # A fourth position is padding: sampled, but of no effect.
    wide = np.broadcast_to(np.concatenate([logits, np.ones((1, 3), np.float32)]), (rows, 4, 3))
    targets = np.broadcast_to(np.array([*target, 0]), (rows, len(target) + 1))
    m, n = np.full(rows, 3), np.full(rows, len(target))
    keys = jax.random.split(jax.random.key(0), rows)

    def estimate(x):
        out = minimum_risk(x, targets, m, n, keys, samples=8)
        return out.sum(), out

    (_, values), grads = jax.jit(jax.value_and_grad(estimate, has_aux=True))(wide)
    assert (grads[:, 3] == 0).all()
    for got, want in ((np.asarray(values), exact), (np.asarray(grads)[:, :3], gradient)):
        z = (got.mean(0) - want) / (got.std(0) / math.sqrt(rows))
        assert np.abs(z).max() < 4  # ten numbers: by chance less than once in 1,500
