"""A mixture keeps its proportions, draws without replacement, and is a closed form."""

import numpy as np
import pytest
from scipy import stats

from gpt_jax.data.batches import BatchOrder
from gpt_jax.data.mixture import MixtureSource, assign, block_counts
from gpt_jax.data.rows import StreamRows
from gpt_jax.data.store import Split
from gpt_jax.errors import UserError

GPT3 = (60, 22, 8, 8, 3)  # Brown et al. 2020, Table 2.2: percent of the training mix


def constant_text(value, tokens):
    """A text whose every token is `value`."""
    return Split(np.full(tokens, value, "<u2"), np.zeros(1, "<u8"), tokens, 0)


def test_frequencies_are_the_weights_by_chi_square():
    source, _ = assign(np.arange(20_000), block_counts(GPT3), seed=1)
    counts = np.bincount(source, minlength=5)
    assert stats.chisquare(counts, np.array(GPT3) / 101 * 20_000).pvalue > 0.001
    # and in every block exactly
    for start in range(0, 1010, 101):
        assert np.bincount(source[start : start + 101], minlength=5).tolist() == list(GPT3)


def test_order_inside_a_block_is_random():
    """Which source comes first in a block, over 1,500 blocks, against the weights."""
    first, _ = assign(np.arange(1500) * 101, block_counts(GPT3), seed=5)
    assert stats.chisquare(np.bincount(first, minlength=5), np.array(GPT3) / 101 * 1500).pvalue > 0.001
    follows, _ = assign(np.arange(1500) * 101 + 1, block_counts(GPT3), seed=5)
    table = np.zeros((5, 5))
    np.add.at(table, (first, follows), 1)
    assert stats.chi2_contingency(table[:2, :2]).pvalue > 0.001


def test_indices_of_a_source_are_all_of_0_1_2_and_none_twice():
    source, index = assign(np.arange(101 * 7), block_counts(GPT3), seed=3)
    for k, weight in enumerate(GPT3):
        assert sorted(index[source == k].tolist()) == list(range(weight * 7))


def test_assignment_is_a_closed_form_of_the_row():
    rows = np.arange(500)
    source, index = assign(rows, block_counts(GPT3), seed=3)
    backwards = assign(rows[::-1], block_counts(GPT3), seed=3)
    np.testing.assert_array_equal(backwards[0][::-1], source)
    np.testing.assert_array_equal(backwards[1][::-1], index)
    one = [assign(np.array([r]), block_counts(GPT3), seed=3) for r in (0, 77, 499)]
    assert [(int(s[0]), int(i[0])) for s, i in one] == [(source[r], index[r]) for r in (0, 77, 499)]


def test_weights_are_kept_exactly_or_rounded_to_ten_thousandths():
    assert block_counts(GPT3).tolist() == list(GPT3)
    assert block_counts([50, 25, 25]).tolist() == [2, 1, 1]
    assert block_counts([0.6, 0.4]).tolist() == [6000, 4000]
    third = block_counts([1 / 3, 1 / 3, 1 / 3])
    assert third.sum() == 10_000 and third.max() - third.min() == 1
    assert block_counts([1.0, 1e-9]).tolist()[1] == 1
    assert block_counts([3, 0]).tolist() == [1, 0]


@pytest.mark.parametrize("weights", [[1, -1], [0, 0], [float("nan"), 1], [float("inf"), 1]])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(UserError, match=r"data\.sources: weights"):
        block_counts(weights)


def mixture(batch_size=8, seed=2):
    """Three texts of 20, 9 and 4 rows, weighted 3 : 2 : 1."""
    makers = [StreamRows(constant_text(v, 5 * n), 5, seed=v) for v, n in ((1, 20), (2, 9), (3, 4))]
    return MixtureSource(makers, [3, 2, 1], ["a", "b", "c"], BatchOrder(batch_size), seed)


def test_rows_come_from_the_assigned_sources():
    source = mixture()
    for step in range(6):
        rows = source.rows(step, slice(None))
        assert (rows["tokens"] == 1 + source.sources(step)[:, None]).all()
        assert rows["tokens"].dtype == np.int32 and rows["target_weights"].dtype == np.float32
    seen = np.concatenate([source.sources(s) for s in range(6)])
    assert np.bincount(seen).tolist() == [24, 16, 8]


def test_slices_of_hosts_concatenate_to_the_global_batch():
    source = mixture()
    for step in range(4):
        whole = source.rows(step, slice(None))
        for name, values in whole.items():
            parts = [source.rows(step, slice(a, b))[name] for a, b in ((0, 3), (3, 4), (4, 8))]
            np.testing.assert_array_equal(np.concatenate(parts), values)


def test_each_source_is_used_up_before_it_repeats():
    """Rows of text c are its four rows in every four it gives: each epoch once."""
    text = Split(np.arange(100, 120).astype("<u2"), np.zeros(1, "<u8"), 20, 0)
    makers = [StreamRows(constant_text(1, 100), 5, seed=1), StreamRows(text, 5, seed=2)]
    source = MixtureSource(makers, [1, 1], ["a", "c"], BatchOrder(8), seed=2)
    rows = np.concatenate([source.rows(s, slice(None))["targets"] for s in range(4)])
    mine = rows[rows[:, 0] >= 100]
    assert len(mine) == 16
    for epoch in range(4):
        assert sorted(mine[4 * epoch : 4 * epoch + 4].ravel().tolist()) != sorted([*range(100, 115), *range(100, 105)])
    # In the order of their index, each four rows are an epoch.
    numbers = np.arange(32)
    where, index = assign(numbers, source.counts, 2)
    by_index = rows[np.argsort(np.where(where == 1, index, 10**6), kind="stable")[:16]]
    for epoch in range(4):
        assert sorted(by_index[4 * epoch : 4 * epoch + 4].ravel().tolist()) == list(range(100, 120))


def test_texts_smaller_than_a_batch_together_are_refused():
    with pytest.raises(UserError, match="the sources a, b, c yield 33 rows, fewer than one batch of 34"):
        mixture(batch_size=34)
