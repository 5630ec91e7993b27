"""The figures of `gpt-jax context`, from the numbers beside them."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def _save(path: pathlib.Path, draw: Any, width: float = 7.0) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, figure.add_subplot())
    figure.savefig(path)


def _clean(axes: Any, x: str, y: str, title: str) -> None:
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _power_ticks(axes: Any, values: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(values), [f"{v:,}" for v in values])
    axes.minorticks_off()


def strided(path: pathlib.Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Perplexity against stride; every point scores the same tokens."""

    def draw(figure: Any, axes: Any) -> None:
        strides = [int(row["stride"]) for row in rows]
        axes.plot(strides, [row["perplexity"] for row in rows], marker="o", color="tab:blue")
        _power_ticks(axes, strides)
        title = f"Window of {rows[0]['size']} tokens, {rows[0]['tokens']:,} tokens scored at every stride"
        _clean(axes, "stride (tokens)", "perplexity", title)

    _save(path, draw)


def buckets(length: int, least: int = 8) -> list[tuple[int, int]]:
    """Positions in pieces that grow as the position does: about eight to an octave, none of fewer than `least`."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, edges[-1] + max(least, edges[-1] // 8)))
    if len(edges) > 2 and edges[-1] - edges[-2] < least // 2:  # a rest too small to be a mean of its own
        del edges[-2]
    return list(itertools.pairwise(edges))


def by_position(path: pathlib.Path, curves: Mapping[str, Mapping[str, Any]], context: int) -> None:
    """Mean loss against position; `curves` by name, each {'loss': [length], 'error': [length]}."""

    def draw(figure: Any, axes: Any) -> None:
        for color, (name, curve) in zip(
            ("tab:blue", "tab:orange", "tab:green", "tab:red"), curves.items(), strict=False
        ):
            loss, error = np.asarray(curve["loss"]), np.asarray(curve["error"])
            pieces = buckets(len(loss))
            middle = [(a + b) / 2 for a, b in pieces]
            mean = np.array([loss[a:b].mean() for a, b in pieces])
            spread = np.array([np.sqrt((error[a:b] ** 2).sum()) / (b - a) for a, b in pieces])
            axes.plot(middle, mean, label=name, color=color)
            axes.fill_between(middle, mean - 2 * spread, mean + 2 * spread, alpha=0.15, color=color, linewidth=0)
        axes.axvline(context, color="0.4", linestyle="--", linewidth=1)
        axes.text(context, 0.98, " trained context", transform=axes.get_xaxis_transform(), va="top", color="0.3")
        if len(curves) > 1:
            axes.legend(frameon=False)
        _clean(axes, "position (tokens)", "loss (nats per token)", "Loss by position, with 2 standard errors")

    _save(path, draw)


def by_budget(path: pathlib.Path, rows: Mapping[int, Mapping[str, float]], context: int) -> None:
    """Loss of the same targets against the number of tokens seen."""

    def draw(figure: Any, axes: Any) -> None:
        budgets = list(rows)
        loss, error = (np.array([rows[b][name] for b in budgets]) for name in ("loss", "difference_error"))
        axes.errorbar(budgets, loss, yerr=2 * error, marker="o", capsize=3, color="tab:blue")
        _power_ticks(axes, budgets)
        axes.axvline(context, color="0.4", linestyle="--", linewidth=1)
        axes.text(
            context, 0.98, "trained context ", transform=axes.get_xaxis_transform(), va="top", ha="right", color="0.3"
        )
        title = (
            f"The same {rows[budgets[0]]['tokens']:,} targets; bars: 2 errors of the difference to the trained context"
        )
        _clean(axes, "tokens seen before the target", "loss (nats per token)", title)

    _save(path, draw)


def streaming(path: pathlib.Path, curves: Mapping[str, Sequence[float]], size: int, piece: int) -> None:
    """Mean loss along a stream, in pieces of `piece` tokens, for caches of the same size."""

    def draw(figure: Any, axes: Any) -> None:
        for name, losses in curves.items():
            middle = (np.arange(len(losses)) + 0.5) * piece
            axes.plot(middle, losses, label=name)
        axes.axvline(size, color="0.4", linestyle="--", linewidth=1)
        axes.text(size, 0.98, " cache is full", transform=axes.get_xaxis_transform(), va="top", color="0.3")
        axes.legend(frameon=False)
        _clean(axes, "tokens streamed", "loss (nats per token)", f"Streaming in a cache of {size} tokens")

    _save(path, draw)


def passkey(path: pathlib.Path, result: Mapping[str, Any], context: int) -> None:
    """A heat map of the part of the keys found, by depth and length."""

    def draw(figure: Any, axes: Any) -> None:
        exact = np.asarray(result["exact"])
        image = axes.imshow(exact, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(result["lengths"])), [f"{n:,}" for n in result["lengths"]])
        axes.set_yticks(range(len(result["depths"])), [f"{d:.0%}" for d in result["depths"]])
        for row, column in np.ndindex(exact.shape):
            value = exact[row, column]
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", color="white" if value < 0.6 else "black")
        inside = sum(n <= context for n in result["lengths"])
        if 0 < inside < len(result["lengths"]):
            axes.axvline(inside - 0.5, color="white", linestyle="--", linewidth=1.5)
        figure.colorbar(image, ax=axes, label="keys found")
        title = f"Passkey retrieval, {result['trials']} keys a cell (dashed: trained context of {context:,})"
        axes.set(xlabel="length of the text (tokens)", ylabel="depth of the key", title=title)

    _save(path, draw)
