"""statistics.py: intervals cover, tests err and find as often as they say, by simulation of five seeds."""

import numpy as np
import pytest
import scipy.stats

from gpt_jax.statistics import holm, mean_interval, paired_test, power, seeds_needed

DRAWS, N = 40_000, 5


def paired_draws(rng, effect=0.0, arms=1, correlation=0.8):
    """A baseline [draws, n] and arms [draws, arms, n] that share the seeds' noise; differences have sd 1."""
    shared = rng.normal(size=(DRAWS, 1, N)) * 2.0
    spread = np.sqrt(0.5)
    baseline = 3.0 + shared + spread * rng.normal(size=(DRAWS, 1, N))
    return baseline, 3.0 + effect + shared + spread * rng.normal(size=(DRAWS, arms, N))


def test_paired_test_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 6)), rng.normal(size=(7, 6))
    got, expected = paired_test(a, b), scipy.stats.ttest_rel(a, b, axis=-1)
    np.testing.assert_allclose(got.t, expected.statistic, rtol=1e-10)
    np.testing.assert_allclose(got.p, expected.pvalue, rtol=1e-10)
    interval = expected.confidence_interval(0.9)
    again = paired_test(a, b, confidence=0.9).difference
    np.testing.assert_allclose([again.low, again.high], [interval.low, interval.high], rtol=1e-10)


def test_intervals_of_five_seeds_cover_the_mean_95_times_in_100():
    baseline, arm = paired_draws(np.random.default_rng(1), effect=0.7)
    one = mean_interval(baseline[:, 0])
    assert np.mean((one.low <= 3.0) & (3.0 <= one.high)) == pytest.approx(0.95, abs=0.02)
    difference = paired_test(arm, baseline).difference
    assert np.mean((difference.low <= 0.7) & (0.7 <= difference.high)) == pytest.approx(0.95, abs=0.02)


def test_an_interval_by_the_normal_distribution_would_not_cover():
    """That the simulation can fail: 1.96 instead of Student's 2.78 covers 88%."""
    values = np.random.default_rng(2).normal(size=(DRAWS, N))
    half = 1.96 * values.std(-1, ddof=1) / np.sqrt(N)
    assert np.mean(np.abs(values.mean(-1)) <= half) < 0.90


def test_false_positives_are_at_most_five_in_a_hundred():
    baseline, arm = paired_draws(np.random.default_rng(3))
    rate = np.mean(paired_test(arm, baseline).p <= 0.05)
    assert rate <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / DRAWS)
    assert rate >= 0.04  # and it is a test at that level, not one that never finds anything


@pytest.mark.parametrize("arms", [2, 6])
def test_holm_keeps_the_family_of_arms_at_five_in_a_hundred(arms):
    baseline, values = paired_draws(np.random.default_rng(4), arms=arms)
    p = paired_test(values, baseline).p
    limit = 0.05 + 2 * np.sqrt(0.05 * 0.95 / DRAWS)
    assert np.mean((p <= 0.05).any(-1)) > limit  # what it is for
    assert np.mean((holm(p) <= 0.05).any(-1)) <= limit


def test_holm_is_the_step_down_of_the_paper():
    """Rejection by adjusted values = Holm's procedure, step by step."""
    rng = np.random.default_rng(5)
    for _ in range(200):
        p = rng.uniform(size=5) ** 3
        rejected = np.zeros(5, bool)
        for step, index in enumerate(np.argsort(p)):
            if p[index] > 0.05 / (5 - step):
                break
            rejected[index] = True
        np.testing.assert_array_equal(holm(p) <= 0.05, rejected)
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, np.nan]), [0.03, 0.06, 0.06, np.nan])


@pytest.mark.parametrize("effect", [0.5, 1.5, 3.0])
def test_power_is_the_rate_at_which_a_true_difference_is_found(effect):
    baseline, arm = paired_draws(np.random.default_rng(6), effect=effect)
    found = np.mean(paired_test(arm, baseline).p <= 0.05)
    assert found == pytest.approx(float(power(effect, N)), abs=3 * np.sqrt(0.25 / DRAWS))


@pytest.mark.parametrize("effect", [0.6, 1.2, 2.5])
def test_the_seeds_needed_find_it_four_times_in_five_and_one_fewer_does_not(effect):
    n = seeds_needed(effect)
    rng = np.random.default_rng(7)

    def rate(n):
        return np.mean(paired_test(effect + rng.normal(size=(DRAWS, n)), np.zeros(n)).p <= 0.05)

    error = 3 * np.sqrt(0.16 / DRAWS)
    assert rate(n) >= 0.8 - error and rate(n - 1) <= 0.8 + error


def test_ends_of_the_range():
    assert seeds_needed(0.0) is None and seeds_needed(float("nan")) is None and seeds_needed(1e-9) is None
    assert seeds_needed(float("inf")) == 2 and seeds_needed(1e6) == 2
    assert paired_test([1.0, 2.0], [1.0, 2.0]).p == 1.0 and paired_test([2.0, 3.0], [1.0, 2.0]).p == 0.0
    alone = paired_test([2.0], [1.0])
    assert alone.difference.mean == 1.0 and np.isnan(alone.p) and np.isnan(alone.difference.low)
