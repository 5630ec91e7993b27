"""Where the time goes: before the first step of a run, and in a few of its steps (a trace for xprof or Perfetto)."""

from __future__ import annotations

import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from gpt_jax.errors import UserError


class Startup:
    """The seconds before the first step, by what they went into; each mark names what passed since the one before.

    Args:
      imports: seconds before now, of the interpreter and its imports. now: a clock in seconds.
    """

    def __init__(self, imports: float | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._last = now, now()
        self.seconds: dict[str, float] = {} if imports is None else {"imports": imports}

    def mark(self, name: str) -> None:
        last, self._last = self._last, self._now()
        self.seconds[name] = self.seconds.get(name, 0.0) + self._last - last

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"start took {sum(self.seconds.values()):.1f} s: {parts}"


def process_seconds() -> float | None:
    """Seconds since this process was started, as Linux says; None elsewhere."""
    try:
        started = float(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return None


def parse_steps(text: str) -> range:
    """'10:12' -> steps 10, 11 and 12, as metrics.jsonl numbers them; '10' is that one; '' none."""
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"--profile is {text!r}; it is a step, or the first and the last of some: 10:12.")
    return range(first, last + 1)


def check_steps(steps: range, start: int, end: int) -> None:
    """Raises UserError if a run from step `start` to `end` makes none of the steps to trace."""
    if steps and not set(steps) & set(range(start + 1, end + 1)):
        makes = f"makes the steps {start + 1} to {end}" if start < end else f"has made all of its {end} steps"
        raise UserError(f"--profile is {steps[0]}:{steps[-1]}, and this run {makes}.")


class Trace:
    """Traces the steps of a range into a folder; costs nothing on others.

    Args:
      folder: where the trace goes. steps: which, counted from 1.
    """

    def __init__(self, folder: pathlib.Path, steps: range) -> None:
        self._folder, self._steps, self._running = folder, steps, False

    def before(self, step: int, state: Any) -> None:
        """Begins the trace if `step` is its first; what runs before it is waited for, so that it is not in it."""
        if step in self._steps and not self._running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """Ends the trace if `step` is its last, when its results are there."""
        if self._running and step >= self._steps[-1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends a trace that is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
