#!/usr/bin/env python3
"""Time and memory of banded attention against the length, beside dense attention: docs/banded.png.

    python scripts/bench_banded.py            # T = 1k ... 16k at window 256, a figure and a line of JSON
    python scripts/bench_banded.py --dry-run  # two short lengths, nothing written: tests this script

One layer's attention, forward and backward, one sequence, 2 heads of 64, float32 on the CPU. Time is the median of
interleaved runs; memory is what XLA allocates for temporaries beside arguments and results.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
WINDOW = 256
KINDS = {"banded, chunks": ("chunks", WINDOW), "banded, blocks": ("blocks", WINDOW), "dense, chunks": ("chunks", None)}


def build(name: str, window: int | None, length: int):
    """Compiles value and gradient of one attention: (function of q, k, v; bytes of temporaries)."""
    import jax
    import jax.numpy as jnp

    from gpt_jax.model.attention import Mask, Variant
    from gpt_jax.model.implementations import run_attention

    def loss(q, k, v):
        out = run_attention(q, k, v, Mask(), Variant(window=window), name=name, block=WINDOW)
        return jnp.sum(out * out)

    shape = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
    return compiled, compiled.memory_analysis().temp_size_in_bytes


def slope(lengths: list[int], values: list[float]) -> float:
    """The exponent p of values ~ T^p, by least squares over the logarithms."""
    x, y = [math.log(n) for n in lengths], [math.log(v) for v in values]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="two short lengths, nothing written")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    import jax

    lengths = [512, 1024] if args.dry_run else [1024, 2048, 4096, 8192, 16384]
    result: dict[str, dict[str, list[float]]] = {kind: {"seconds": [], "megabytes": []} for kind in KINDS}
    for length in lengths:
        inputs = [jax.random.normal(jax.random.key(i), (1, length, 2, 64)) for i in range(3)]
        built = {kind: build(*how, length) for kind, how in KINDS.items()}
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for i in range(args.repeats + 1):
            for kind, (run, _) in built.items():
                start = time.perf_counter()
                jax.block_until_ready(run(*inputs))
                if i:
                    times[kind].append(time.perf_counter() - start)
        for kind, (_, size) in built.items():
            result[kind]["seconds"].append(statistics.median(times[kind]))
            result[kind]["megabytes"].append(size / 1e6)
        print(length, {k: (round(v["seconds"][-1], 4), round(v["megabytes"][-1], 1)) for k, v in result.items()})
    exponents = {
        kind: {what: round(slope(lengths, values), 2) for what, values in one.items()} for kind, one in result.items()
    }
    if not args.dry_run:
        draw(lengths, result)
    print(json.dumps({"lengths": lengths, "results": result, "exponents": exponents}))
    return 0


def draw(lengths: list[int], result: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for axis, what, label in zip(axes, ("seconds", "megabytes"), ("seconds, forward + backward", "MB"), strict=True):
        for kind, one in result.items():
            axis.loglog(lengths, one[what], "o-", label=kind)
        first = result["banded, chunks"][what][0]
        axis.loglog(lengths, [first * n / lengths[0] for n in lengths], "k:", label="proportional to T")
        axis.set(xlabel="T", ylabel=label)
        axis.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        axis.minorticks_off()
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "banded.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
