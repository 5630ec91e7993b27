"""The loader: global arrays from local rows, ahead of the consumer, with errors where they are seen."""

import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gpt_jax.data.loader import Loader, global_batch


class Source:
    """Rows that say which step and row they are; records what is asked of it."""

    def __init__(self, rows=8, length=6, fail_at=None, delay=0.0):
        self.asked, self._rows, self._length, self._fail_at, self._delay = [], rows, length, fail_at, delay

    def spec(self):
        return {"tokens": jax.ShapeDtypeStruct((self._rows, self._length), np.int32)}

    def batch_size(self, step):
        return self._rows

    def rows(self, step, rows):
        start, stop, _ = rows.indices(self._rows)
        self.asked.append((step, start, stop))
        time.sleep(self._delay)
        if step == self._fail_at:
            raise ValueError("the disk is gone")
        return {"tokens": self.expected(step)[start:stop]}

    def expected(self, step):
        row, column = np.indices((self._rows, self._length))
        return (step * 10_000 + row * 100 + column).astype(np.int32)


def mesh(shape, names):
    return jax.sharding.Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), names)


@pytest.mark.parametrize("spec", [("d", None), (None, None), ("d", "s"), (None, "s")])
def test_global_batch_is_the_source_rows_whatever_the_sharding(spec):
    source = Source()
    sharding = NamedSharding(mesh((4, 2), ("d", "s")), PartitionSpec(*spec))
    for shardings in (sharding, {"tokens": sharding}):
        batch = global_batch(source, 3, shardings)
        assert batch["tokens"].sharding == sharding
        np.testing.assert_array_equal(batch["tokens"], source.expected(3))


def test_each_row_is_built_once_per_batch():
    """Four groups of rows on eight devices: the two devices of a group share what is built."""
    source = Source()
    global_batch(source, 0, NamedSharding(mesh((4, 2), ("d", "s")), PartitionSpec("d", "s")))
    assert sorted(source.asked) == [(0, 0, 2), (0, 2, 4), (0, 4, 6), (0, 6, 8)]


def test_iterates_from_start_to_stop_in_order():
    source = Source()
    with Loader(source, start_step=5, stop_step=9) as loader:
        got = [(step, np.asarray(batch["tokens"])) for step, batch in loader]
    assert [step for step, _ in got] == [5, 6, 7, 8]
    for step, tokens in got:
        np.testing.assert_array_equal(tokens, source.expected(step))


def test_ends_after_the_batches_of_a_validation_source():
    source = Source()
    source.num_batches = 3
    assert [s for s, _ in Loader(source)] == [0, 1, 2]
    assert [s for s, _ in Loader(source, stop_step=2)] == [0, 1]
    assert [s for s, _ in Loader(source, stop_step=20)] == [0, 1, 2]


def test_prefetches_no_more_than_asked():
    source = Source()
    with Loader(source, prefetch=3) as loader:
        deadline = time.monotonic() + 5
        while len(source.asked) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.15)
        assert len(source.asked) == 4  # three in the queue and one in hand
        next(loader)


def test_error_of_the_thread_reaches_the_consumer_in_its_place():
    seen = []
    with pytest.raises(ValueError, match="the disk is gone"), Loader(Source(fail_at=2)) as loader:
        for step, _ in loader:
            seen.append(step)
    assert seen == [0, 1]
    with pytest.raises(StopIteration):
        next(loader)


def test_closing_early_ends_the_thread():
    before = threading.active_count()
    loader = Loader(Source(), prefetch=1)
    next(loader)
    loader.close()
    assert threading.active_count() == before
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)


def test_stall_is_the_time_the_consumer_waited():
    with Loader(Source(delay=0.2), stop_step=2, prefetch=1) as slow:
        next(slow)
        assert 0.1 < slow.stall_seconds < 2.0
    with Loader(Source(), stop_step=3, prefetch=2) as fast:
        time.sleep(0.3)
        next(fast)
        assert fast.stall_seconds < 0.05
