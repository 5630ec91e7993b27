"""The report of a run as one HTML file: curves, samples over time, speed, parameters and memory, evaluation, config.

Nothing is fetched when it is opened. report.py writes the same run's Markdown.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gpt_jax.pages import Page, new_figure, png_of
from gpt_jax.sharding import path_name
from gpt_jax.workdir import Workdir

_PARTS = (
    ("token embedding", "/embedding"),
    ("position embedding", "/position_embedding"),
    ("output layer", "model/head"),
    ("norms", "norm/"),
    ("attention", "/attention/"),
    ("feed-forward", "/mlp/"),
)


def describe_memory(step: Any) -> dict[str, Any]:
    """What a TrainStep keeps: parameters by part, and bytes of each part of its state, over all devices and on one.

    Args:
      step: a TrainStep.

    Returns:
      {"parameters": {root and part: count}, "bytes": {what: bytes}, "per_device": {what: bytes}, "devices": n,
      "peak_process_bytes": of this process so far, "peak_device_bytes": of one device, if it tells}.
    """
    parameters: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(step.abstract.all_params):
        name = path_name(path)
        part = next((part for part, found in _PARTS if found in name), "other")
        root = name.partition("/")[0]
        label = part if root == "model" else f"{root}: {part}"
        parameters[label] = parameters.get(label, 0) + int(leaf.size)
    state, placed = step.abstract, step.shardings
    kinds = {
        "parameters": (state.params, placed.params),
        "gradients": (state.params, placed.params),
        "optimizer state": (state.opt_state, placed.opt_state),
        "average (EMA)": (state.ema, placed.ema),
        "frozen parameters": (state.frozen, placed.frozen),
        "batch": (step.batch_spec, step.batch_shardings),
    }
    whole = {what: _bytes(tree, None, 4 if what == "gradients" else 0) for what, (tree, _) in kinds.items()}
    one = {what: _bytes(tree, shards, 4 if what == "gradients" else 0) for what, (tree, shards) in kinds.items()}
    device = step.mesh.devices.flat[0]
    statistics_of = device.memory_stats() if device.process_index == jax.process_index() else None
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "parameters": parameters,
        "bytes": {what: size for what, size in whole.items() if size},
        "per_device": {what: one[what] for what, size in whole.items() if size},
        "devices": int(step.mesh.devices.size),
        "peak_process_bytes": usage if sys.platform == "darwin" else usage * 1024,
        "peak_device_bytes": (statistics_of or {}).get("peak_bytes_in_use"),
    }


def _bytes(tree: Any, shardings: Any, itemsize: int) -> int:
    """Bytes of a tree of arrays; with shardings those of one device. itemsize: instead of the dtype's, 0 keeps it."""
    leaves = jax.tree.leaves(tree)
    placed = jax.tree.leaves(shardings) if shardings is not None else [None] * len(leaves)
    total = 0
    for leaf, sharding in zip(leaves, placed, strict=True):
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * (itemsize or leaf.dtype.itemsize)
    return total


def report_page(
    run: Workdir,
    config: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    summary: str,
    loss_png: bytes,
    evaluation: Sequence[Sequence[str]],
    training: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> Page:
    """Lays the page out.

    Args:
      run: the directory. config: resolved. rows: of metrics.jsonl. summary: the first sentence. loss_png: its curve.
      evaluation: a table, its header first; [] if there is none. training: names and values. environment: as recorded.
    """
    page = Page(config.name or run.path.name)
    page.text(summary)
    page.heading("Loss")
    page.picture("loss", loss_png, "Training and validation loss by step")
    page.heading("Final evaluation")
    if evaluation:
        page.table(evaluation[0], evaluation[1:])
    else:
        page.text("Not evaluated.")
    _validation(page, rows)
    page.heading("Speed and optimisation")
    page.values(training)
    page.picture("training", plot_training(rows), "Gradient norm, learning rate, speed and stalls by step")
    page.heading("Parameters and memory")
    _memory(page, run.read_json("memory.json") or {})
    _spikes(page, run)
    page.heading("Samples over time")
    _samples(page, run)
    page.heading("What made it")
    for name, tree in (
        ("Data", environment.get("data", {})),
        ("Code, packages and machine", {k: v for k, v in environment.items() if k != "data"}),
        ("Config", run.read_config() or {}),
        ("History", run.history()),
    ):
        page.code(json.dumps(tree, indent=1, ensure_ascii=False), name)
    return page


def _validation(page: Page, rows: Sequence[Mapping[str, Any]], most: int = 12) -> None:
    measured = [row for row in rows if any(name.startswith("valid/") for name in row)]
    if len(measured) < 2:
        return
    names = [n for n in measured[-1] if n.startswith("valid/") and not n.endswith("/tokens")][:8]
    chosen = [measured[i] for i in np.unique(np.linspace(0, len(measured) - 1, most).astype(int))]
    page.heading("Validation along the way", 3)
    table = [[row["step"], *(row.get(name) for name in names)] for row in chosen]
    page.table(["step", *(name.removeprefix("valid/").replace("_", " ") for name in names)], table)


def _memory(page: Page, memory: Mapping[str, Any]) -> None:
    if not memory:
        page.text("Not recorded.")
        return
    counts = memory["parameters"]
    total = sum(counts.values())
    page.table(
        ("part", "parameters", "share"),
        [(part, n, f"{100 * n / total:.1f}%") for part, n in sorted(counts.items(), key=lambda item: -item[1])]
        + [("all (padded vocabulary included)", total, "100%")],
    )
    rows = [
        (what, f"{size / 2**20:,.1f}", f"{memory['per_device'][what] / 2**20:,.1f}")
        for what, size in memory["bytes"].items()
    ]
    sums = [sum(memory[key].values()) / 2**20 for key in ("bytes", "per_device")]
    rows.append(("all, without activations", f"{sums[0]:,.1f}", f"{sums[1]:,.1f}"))
    page.table(("memory", "MiB in all", f"MiB on one of {memory['devices']}"), rows)
    peak = f"Peak of the process: {memory['peak_process_bytes'] / 2**20:,.0f} MiB resident"
    if memory.get("peak_device_bytes"):
        peak += f"; of a device: {memory['peak_device_bytes'] / 2**20:,.0f} MiB"
    page.text(peak + ".")


def _spikes(page: Page, run: Workdir) -> None:
    files = sorted((run.path / "spikes").glob("step_*.json"))
    if not files:
        return
    page.heading("Spikes")
    found = [json.loads(path.read_text()) for path in files]
    page.table(
        ("step", "z-scores", "repeat it"),
        [
            (
                s["step"],
                ", ".join(f"{k} {v}" for k, v in s["why"].items()),
                f"`gpt-jax replay {run.path} --step={s['step']}`",
            )
            for s in found
        ],
    )


def _samples(page: Page, run: Workdir, most: int = 8) -> None:
    files = sorted(run.samples_path.glob("step_*.txt")) if run.samples_path.is_dir() else []
    if not files:
        page.text("None.")
        return
    for i in np.unique(np.linspace(0, len(files) - 1, most).astype(int)):
        step = int(files[i].stem.removeprefix("step_"))
        text = files[i].read_text(errors="replace").strip()[:1500]
        if i == len(files) - 1:
            page.text(f"Step {step:,}:")
            page.code(text)
        else:
            page.code(text, f"step {step:,}")


def plot_training(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Gradient norm, learning rate, tokens per second and the share of time that waits for data, by step. PNG."""
    figure, axes = new_figure(9, 5, 2, 2, sharex=True)
    panels = (
        ("train/grad_norm", "gradient norm", "log"),
        ("train/lr", "learning rate", "linear"),
        ("perf/tokens_per_s", "tokens per second", "linear"),
        ("perf/stall", "time waiting for data (%)", "linear"),
    )
    for axis, (name, label, scale) in zip(axes.flat, panels, strict=True):
        points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
        points = points[1:] if name.startswith("perf/") else points  # the first step compiles
        if points:
            x, y = (np.array(column, float) for column in zip(*points, strict=True))
            y = 100 * y if name == "perf/stall" else y
            axis.plot(x, y, linewidth=1.2, color="tab:blue")
            if scale == "log" and (y > 0).all() and y.max() > 20 * y.min():
                axis.set_yscale("log")
            elif name.startswith("perf/"):
                axis.set_ylim(0, 1.15 * max(float(y.max()), 1e-6 if name != "perf/stall" else 1.0))
                middle = statistics.median(y.tolist())
                axis.axhline(middle, color="0.5", linewidth=0.9, linestyle="--")
                shown = f"median {middle:,.0f}" if middle >= 100 else f"median {middle:.2f}"
                axis.annotate(shown, (0.98, 0.92), xycoords="axes fraction", ha="right", fontsize=9)
        else:
            axis.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axis.transAxes)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    return png_of(figure)
