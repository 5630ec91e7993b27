"""A trace of a few steps of a run, for xprof (TensorBoard's profile page) or Perfetto."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import jax

from gpt_jax.errors import UserError


def parse_steps(text: str) -> range:
    """'10:12' -> steps 10, 11 and 12, as metrics.jsonl numbers them; '10' is that one; '' none."""
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"--profile is {text!r}; it is a step, or the first and the last of some: 10:12.")
    return range(first, last + 1)


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
