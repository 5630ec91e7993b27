"""What a run says while it goes: one greppable line per report, and a progress bar where output is a terminal."""

from __future__ import annotations

import sys
from typing import Any, TextIO


def console_line(
    step: int,
    steps: int,
    *,
    loss: float,
    loss_z: float | None = None,
    gnorm: float | None = None,
    gnorm_z: float | None = None,
    lr: float | None = None,
    ms: float | None = None,
    tokens_per_s: float | None = None,
    mfu: float | None = None,
    eta: float | None = None,
    more: str = "",
) -> str:
    """Returns the line of a training step.

    Example: `step 00042/02000 ( 2.1%) | loss 3.9983 (+0.3z) | gnorm 0.91 (-0.1z) | lr 6.0e-04 | 412 ms | 9,942 tok/s |
    mfu 41.2% | eta 13m`. What is None is left out, except the MFU, which is 'n/a' where the peak is not known.

    Args:
      loss_z, gnorm_z: z-scores.
      mfu: a fraction.
      eta: seconds.
      more: further parts, already formatted.
    """
    width = max(5, len(str(steps)))
    parts = [
        f"step {step:0{width}d}/{steps:0{width}d} ({100 * step / max(steps, 1):4.1f}%)",
        f"loss {loss:.4f}{_z(loss_z)}",
    ]
    if gnorm is not None:
        parts.append(f"gnorm {gnorm:.2f}{_z(gnorm_z)}")
    if lr is not None:
        parts.append(f"lr {lr:.1e}")
    if ms is not None:
        parts.append(f"{ms:,.0f} ms" if ms >= 10 else f"{ms:.1f} ms")
    if tokens_per_s is not None:
        parts.append(f"{tokens_per_s:,.0f} tok/s")
    parts.append("mfu n/a" if mfu is None else f"mfu {100 * mfu:.1f}%")
    if eta is not None:
        parts.append(f"eta {format_seconds(eta)}")
    if more:
        parts.append(more)
    return " | ".join(parts)


def format_seconds(seconds: float) -> str:
    """Returns a duration in its two largest units: 45s, 13m, 2h05m, 3d04h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes}m"
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(minutes / 60)
    return f"{hours // 24}d{hours % 24:02d}h"


def _z(z: float | None) -> str:
    return "" if z is None else f" ({z:+.1f}z)"


class Console:
    """Prints a run's lines; on a terminal a progress bar stays below them.

    Args:
      steps: of the whole run.
      start: steps done already.
      stream: where to; not a terminal: plain lines only, each flushed.
      quiet: prints nothing (all but the first of several processes).
    """

    def __init__(self, steps: int, start: int = 0, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._quiet = quiet
        self._bar: Any = None
        if not quiet and self._stream.isatty():
            import rich.console
            import rich.progress

            self._bar = rich.progress.Progress(
                rich.progress.BarColumn(bar_width=None),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TimeRemainingColumn(),
                console=rich.console.Console(file=self._stream),
            )
            self._task = self._bar.add_task("", total=steps, completed=start)
            self._bar.start()

    def show(self, line: str) -> None:
        """Prints a line."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)

    def progress(self, step: int) -> None:
        """Moves the bar, if there is one, to `step`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def close(self) -> None:
        """Removes the bar."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
