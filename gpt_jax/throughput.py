"""How fast a run goes: tokens per second, the share of them that waits for data, and model FLOPs utilisation (MFU)."""

from __future__ import annotations

import collections
import contextlib
import re
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

# Published dense bf16 peaks, FLOP/s of one jax device (a chip), by words of its `device_kind`; the first match counts.
# TPU: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e). GPU: NVIDIA's data sheets, without sparsity.
_PEAKS = (
    ("TPU v4 lite", None),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
)


def model_flops_per_token(num_params: int, num_layers: int, d_model: int, context_length: int) -> float:
    """Returns 6 N + 12 L D T: forward and backward of one token (PaLM, arXiv:2204.02311, appendix B).

    Args:
      num_params: N, parameters with a tied embedding counted once.
      num_layers, d_model, context_length: L, D, T; attention is counted without its causal half.
    """
    return 6.0 * num_params + 12.0 * num_layers * d_model * context_length


def peak_flops(device_kind: str) -> float | None:
    """Returns the published bf16 peak of an accelerator in FLOP/s per device; None where it is not known."""
    return next((peak for name, peak in _PEAKS if re.search(rf"\b{name}\b", device_kind)), None)


def measure_cpu_peak(size: int = 2048, repeats: int = 5) -> float:
    """Returns the best FLOP/s of a plain jitted fp32 product of two `size` x `size` matrices on the first device."""
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)


def total_peak(devices: list[jax.Device]) -> float | None:
    """Returns the peak of all devices together: on CPU measured (its devices share the cores), else published."""
    if devices[0].platform == "cpu":
        return measure_cpu_peak()
    peak = peak_flops(devices[0].device_kind)
    return None if peak is None else peak * len(devices)


class Clock:
    """Measures steps: the time from one `tick` to the next, without what passed inside `pause`.

    What it returns is the mean over the last 8 ticks: where steps run ahead of the ticks, one tick may hold the time
    of two and the next none. The first tick, which compiles, stands alone.

    Args:
      flops_per_token: of the model, see `model_flops_per_token`.
      peak: FLOP/s of all devices together; None leaves MFU out.
      now: a clock in seconds.
    """

    def __init__(
        self, flops_per_token: float, peak: float | None, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._flops_per_token, self._peak, self._now = flops_per_token, peak, now
        self._last = now()
        self._paused = 0.0
        self._recent: collections.deque[tuple[float, int, float, int]] = collections.deque(maxlen=8)
        self._first: tuple[int, float] | None = None
        self._latest: tuple[int, float] | None = None

    def tick(self, step: int, tokens: int, stall_seconds: float = 0.0, steps: int = 1) -> dict[str, float]:
        """Ends a step (or several) and returns its `perf/*` values.

        Args:
          step: optimizer updates done.
          tokens: trained on since the last tick.
          stall_seconds: how long the loop waited for data since the last tick.
          steps: updates since the last tick.

        Returns:
          perf/step_ms, perf/tokens_per_s, perf/stall (fraction of the time) and, if the peak is known, perf/mfu.
        """
        now = self._now()
        window = [(now - self._last - self._paused, tokens, stall_seconds, steps)]
        self._last, self._paused = now, 0.0
        if self._first is None:
            self._first = (step, now)
        else:
            self._recent.append(window[0])
            window = list(self._recent)
        self._latest = (step, now)
        seconds, tokens, stall, steps = (sum(column) for column in zip(*window, strict=True))
        seconds = max(seconds, 1e-9)
        rate = tokens / seconds
        values = {
            "perf/step_ms": 1e3 * seconds / steps,
            "perf/tokens_per_s": rate,
            "perf/stall": min(stall / seconds, 1.0),
        }
        if self._peak:
            values["perf/mfu"] = rate * self._flops_per_token / self._peak
        return values

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves what happens in the block (validation, sampling) out of the step's time."""
        start = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - start

    def eta(self, steps: int) -> float | None:
        """Returns the seconds to step `steps` at the mean pace so far, pauses included; None before two ticks."""
        if self._first is None or self._latest is None or self._latest[0] == self._first[0]:
            return None
        (first, start), (last, end) = self._first, self._latest
        return (end - start) / (last - first) * max(steps - last, 0)
