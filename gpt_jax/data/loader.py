"""Batches ahead of the step: a thread builds them and puts them on the devices while the step runs."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np


def global_batch(source: Any, step: int, shardings: Any = None) -> dict[str, Any]:
    """Returns the batch of a step as global arrays; this host builds only the rows that its devices hold.

    Args:
      source: has rows(step, slice) and batch_size(step), or `parts`: sources by name, for a batch of sub-batches.
      step: its number.
      shardings: one for all arrays, a mapping by name, or None (the default device).
    """
    if hasattr(source, "parts"):
        return {
            name: global_batch(part, step, shardings[name] if isinstance(shardings, Mapping) else shardings)
            for name, part in source.parts.items()
        }
    size = source.batch_size(step)
    built: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def rows(start: int, stop: int) -> dict[str, np.ndarray]:
        if (start, stop) not in built:
            built[start, stop] = source.rows(step, slice(start, stop))
        return built[start, stop]

    if shardings is None:
        return jax.device_put(rows(0, size))
    out = {}
    for name, spec in source.spec().items():
        sharding = shardings[name] if isinstance(shardings, Mapping) else shardings

        def local(index: tuple[slice, ...], name: str = name) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            return rows(start, stop)[name][(slice(None), *index[1:])]

        out[name] = jax.make_array_from_callback((size, *spec.shape[1:]), sharding, local)
    return out


class Loader:
    """Iterates over (step, batch), prefetched.

    Args:
      source: has spec(), rows(step, slice), batch_size(step) and perhaps num_batches.
      shardings: as in `global_batch`.
      start_step: the first step.
      stop_step: the step before which it ends; None: never, or after the source's num_batches.
      prefetch: batches held ready, at least 1.

    Attributes:
      stall_seconds: how long the consumer waited for the last batch.
      perf: {'perf/...': value} that making it took, of sources that have more to tell.
    """

    def __init__(
        self, source: Any, shardings: Any = None, start_step: int = 0, stop_step: int | None = None, prefetch: int = 2
    ):
        self.stall_seconds, self.perf = 0.0, {}
        last = getattr(source, "num_batches", None)
        self._stop = last if stop_step is None else stop_step if last is None else min(last, stop_step)
        self._source, self._shardings, self._start = source, shardings, start_step
        self._queue: queue.Queue = queue.Queue(max(1, prefetch))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        step = self._start
        try:
            while not self._closed.is_set() and (self._stop is None or step < self._stop):
                self._put((step, global_batch(self._source, step, self._shardings), None))
                step += 1
            self._put((step, None, None))
        except BaseException as error:
            self._put((step, None, error))

    def _put(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        return self

    def __next__(self) -> tuple[int, dict[str, jax.Array]]:
        if self._closed.is_set():
            raise StopIteration
        before = time.perf_counter()
        step, batch, error = self._queue.get()
        self.stall_seconds = time.perf_counter() - before
        if error is not None:
            self.close()
            raise error
        if batch is None:
            self.close()
            raise StopIteration
        return step, batch

    def close(self) -> None:
        """Ends the thread; further iteration stops at once."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
