"""Statistics of a few paired runs: intervals, a paired test, correction for many arms, and how many seeds are enough.

Arms of an ablation share seeds (initial weights, order of the data, masks), so what is tested is the difference within
a seed. Everything is Student's t: with five seeds a normal approximation would call 12% of nothing a finding. All
functions take arrays with seeds on the last axis and work on any leading axes at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import special


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval; low and high are nan with fewer than two values.

    Attributes:
      mean, low, high, sd: in the unit of the values; sd with n - 1. n: how many values.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    sd: np.ndarray
    n: int


@dataclasses.dataclass(frozen=True)
class Paired:
    """A paired comparison: the differences' interval, t with n - 1 degrees of freedom, and its two-sided p-value."""

    difference: Interval
    t: np.ndarray
    p: np.ndarray

    @property
    def effect(self) -> np.ndarray:
        """The mean difference in standard deviations of the differences (Cohen's d_z)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.abs(self.difference.mean) / self.difference.sd


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> Interval:
    """The mean over the last axis with its t interval, mean +- t_{n-1} sd / sqrt(n).

    Args:
      values: [..., n]. confidence: probability that the interval covers the true mean, for normal values.
    """
    values = np.asarray(values, np.float64)
    n = values.shape[-1]
    mean = values.mean(-1)
    if n < 2:
        missing = np.full_like(mean, np.nan)
        return Interval(mean, missing, missing, missing, n)
    sd = values.std(-1, ddof=1)
    half = special.stdtrit(n - 1, 0.5 + confidence / 2) * sd / np.sqrt(n)
    return Interval(mean, mean - half, mean + half, sd, n)


def paired_test(values: np.ndarray, baseline: np.ndarray, confidence: float = 0.95) -> Paired:
    """Student's paired t test of values - baseline, both [..., n] with the same seeds in the same order.

    Where all differences are equal, t is infinite and p is 0, or p is 1 if they are all 0. p is nan below two pairs.
    """
    difference = mean_interval(np.asarray(values, np.float64) - np.asarray(baseline, np.float64), confidence)
    n = difference.n
    if n < 2:
        missing = np.full_like(difference.mean, np.nan)
        return Paired(difference, missing, missing)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = difference.mean / (difference.sd / np.sqrt(n))
    t = np.where((difference.sd == 0) & (difference.mean == 0), 0.0, t)
    return Paired(difference, t, 2.0 * special.stdtr(n - 1, -np.abs(t)))


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's (1979) adjusted p-values over the last axis: reject those up to alpha, and no more than alpha of families
    of true nulls see a rejection. A nan (a test that could not be made) stays nan and does not count.

    The i-th smallest of m is max over j <= i of min(1, (m - j + 1) p_(j)).
    """
    p = np.asarray(p_values, np.float64)
    m = np.sum(~np.isnan(p), axis=-1, keepdims=True)
    order = np.argsort(p, axis=-1, kind="stable")  # nan last
    ranked = np.take_along_axis(p, order, -1)
    factors = np.maximum(m - np.arange(p.shape[-1]), 1)
    adjusted = np.minimum(1.0, np.maximum.accumulate(factors * ranked, axis=-1))
    out = np.empty_like(p)
    np.put_along_axis(out, order, adjusted, -1)
    return np.where(np.isnan(p), np.nan, out)


def power(effect: float | np.ndarray, n: int | np.ndarray, alpha: float = 0.05) -> np.ndarray:
    """The probability that a paired t test of n pairs at level alpha finds a true difference of `effect` deviations.

    Args:
      effect: |mean| / sd of the differences. n: pairs, at least 2. alpha: two-sided.

    Returns:
      P(|T| > t_{1 - alpha/2, n-1}) of a noncentral t with noncentrality effect sqrt(n).
    """
    effect, n = np.abs(np.asarray(effect, np.float64)), np.asarray(n, np.float64)
    critical = special.stdtrit(n - 1, 1 - alpha / 2)
    shift = effect * np.sqrt(n)
    found = 1.0 - special.nctdtr(n - 1, shift, critical) + special.nctdtr(n - 1, shift, -critical)
    return np.where(shift > 37, 1.0, found)  # beyond it the noncentral distribution is not computable, nor needed


def seeds_needed(effect: float, wanted: float = 0.8, alpha: float = 0.05, most: int = 100_000) -> int | None:
    """The least number of pairs whose test finds a difference of `effect` standard deviations with power `wanted`.

    Returns:
      At least 2; None for no effect, or where `most` pairs are not enough.
    """
    if np.isnan(effect) or effect <= 0:
        return None
    if np.isinf(effect):
        return 2
    low, high = 1, 2
    while power(effect, high, alpha) < wanted:
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if power(effect, middle, alpha) < wanted:
            low = middle
        else:
            high = middle
    return high
