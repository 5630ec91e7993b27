#!/usr/bin/env python3
"""Planned against measured peak memory of a train step on this CPU, and what 1 to 8 simulated devices send and hold.

    python scripts/plan_vs_measured.py             # both tables, in docs/PODS.md (a few minutes on two cores)
    python scripts/plan_vs_measured.py --only "12 layers"   # shapes with this in their name; the other rows stay
    python scripts/plan_vs_measured.py --dry-run   # one small shape, nothing written: tests this script

Measured: the process's peak resident memory over two real steps, less what it held before the state was made (after
compiling). Each shape is a process of its own, with glibc told to give freed memory back. Planned: arguments + outputs
- aliased + temporaries of the same program, as `gpt-jax plan --devices 1` prints them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "PODS.md"

BASE = {
    "batch_size": "8",
    "context_length": "512",
    "model.vocab_size": "8192",
    "model.num_layers": "6",
    "model.d_model": "384",
    "model.num_heads": "6",
    "model.unroll": "1",
    "optimizer.name": "adamw",
}
SHAPES = {
    "6 layers, 8 x 512 tokens": {},
    "the same, remat full": {"model.remat": "full"},
    "the same, remat dots_no_batch": {"model.remat": "dots_no_batch"},
    "the same, 4 micro-batches": {"microbatches": "4"},
    "8 x 1,024 tokens": {"context_length": "1024"},
    "8 x 1,024 tokens, remat full": {"context_length": "1024", "model.remat": "full"},
    "8 x 1,024 tokens, remat full, 4 micro-batches": {
        "context_length": "1024",
        "model.remat": "full",
        "microbatches": "4",
    },
    "12 layers, 8 x 512 tokens": {"model.num_layers": "12"},
}
TINY = {
    "batch_size": "4",
    "context_length": "64",
    "model.num_layers": "2",
    "model.d_model": "64",
    "model.num_heads": "2",
}


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (at most)."""
    return int(re.search(rf"{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024


def settled() -> int:
    """Resident memory once the runtime has given back what it freed, which it does a little later."""
    lowest, since = resident("VmRSS"), time.monotonic()
    while time.monotonic() - since < 2.0:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        time.sleep(0.1)
        now = resident("VmRSS")
        if now < 0.99 * lowest:
            lowest, since = now, time.monotonic()
    return resident("VmRSS")


def worker(keys: dict[str, str]) -> dict[str, float]:
    """Plans and then trains two steps, in this process."""
    import jax
    import numpy as np

    from gpt_jax.ahead import abstract_step, compile_step
    from gpt_jax.config import load
    from gpt_jax.topologies import simulated

    machine = simulated(1)
    planned = compile_step(load("quickstart", keys), machine)
    _, step = abstract_step(load("quickstart", keys), machine)
    batch = {k: np.ones(s.shape, s.dtype) for k, s in step.batch_spec.items()}
    state, _ = step(step.init(0), step.put(batch))  # everything is compiled, then forgotten
    jax.block_until_ready(state)
    del state
    before = settled()
    state, placed = step.init(0), step.put(batch)
    jax.block_until_ready(state)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    for _ in range(2):
        state, metrics = step(state, placed)
    jax.block_until_ready((state, metrics))
    return {"planned": planned.hbm_bytes, "measured": resident("VmHWM") - before}


def measure(keys: dict[str, str]) -> dict[str, float]:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "2",
    }
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(keys)], env=env, capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def scaling(keys: dict[str, str], counts: tuple[int, ...]) -> list[dict]:
    """Plans one config on each number of simulated devices."""
    from gpt_jax.ahead import compile_step
    from gpt_jax.config import load
    from gpt_jax.hlo import totals
    from gpt_jax.topologies import simulated

    simulated(max(counts))
    rows = []
    for n in counts:
        compiled = compile_step(load("quickstart", keys), simulated(n))
        rows.append({"devices": n, "state": compiled.state_bytes, "rest": compiled.temporary_bytes})
        rows[-1]["collectives"] = totals(compiled.collectives)
    return rows


def write(name: str, text: str) -> None:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = PAGE.read_text()
    PAGE.write_text(f"{page.split(begin)[0]}{begin}\n{text}\n{end}{page.split(end)[1]}")


def rows_kept() -> dict[str, dict[str, float]]:
    """The rows that the page has."""
    rows = re.findall(r"^\| ([^|]*?) \| ([\d,]+) \| ([\d,]+) \| [\d.]+ \|$", PAGE.read_text(), re.M)
    return {
        name: {"planned": 1e6 * int(a.replace(",", "")), "measured": 1e6 * int(b.replace(",", ""))}
        for name, a, b in rows
    }


def errors(results: dict[str, dict[str, float]]) -> list[float]:
    return [abs(r["planned"] / r["measured"] - 1) for r in results.values()]


def error_line(results: dict[str, dict[str, float]]) -> str:
    """What the page says under the table."""
    found = errors(results)
    return f"Error of the plan: median {statistics.median(found):.1%}, at most {max(found):.1%}."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="one small shape, nothing written")
    parser.add_argument("--only", default="", help="shapes with this in their name; the other rows of the page stay")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return 0
    shapes = {"tiny": TINY} if args.dry_run else SHAPES
    results = {} if args.dry_run or not args.only else rows_kept()
    lines = ["| shape | planned MB | measured MB | planned / measured |", "|---|---|---|---|"]
    for name, keys in shapes.items():
        if args.only in name or name not in results:
            results[name] = measure(BASE | keys)
        r = results[name]
        ratio = r["planned"] / r["measured"]
        lines.append(f"| {name} | {r['planned'] / 1e6:,.0f} | {r['measured'] / 1e6:,.0f} | {ratio:.3f} |")
        print(lines[-1], flush=True)
    counts = (1, 2) if args.dry_run else (1, 2, 4, 8)
    rows = [] if args.only else scaling(BASE | (TINY if args.dry_run else {"model.remat": "full"}), counts)
    kinds = sorted({kind for row in rows for kind in row["collectives"]})
    table = ["| devices (fsdp) | state MB a device | rest MB a device | " + " | ".join(f"{k} MB" for k in kinds) + " |"]
    table.append("|---" * (3 + len(kinds)) + "|")
    for row in rows:
        sent = [f"{row['collectives'].get(k, {'bytes': 0})['bytes'] / 1e6:,.1f}" for k in kinds]
        numbers = [str(row["devices"]), f"{row['state'] / 1e6:,.1f}", f"{row['rest'] / 1e6:,.1f}", *sent]
        table.append(f"| {' | '.join(numbers)} |")
        print(table[-1], flush=True)
    if not args.dry_run:
        lines.append(f"\n{error_line(results)}")
        write("plan_vs_measured", "\n".join(lines))
        if rows:
            write("scaling", "\n".join(table))
    print(json.dumps({"results": results, "largest_error": max(errors(results)), "scaling": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
