#!/usr/bin/env python3
"""Compiles GPT-3's sizes and two of Llama 2 for TPU slices and GPU clusters, and writes the table in docs/PODS.md.

    python scripts/plan_table.py                      # all rows (about half an hour on two cores)
    python scripts/plan_table.py --only gpt3_175b     # rows of these configs, comma-separated; the others stay
    python scripts/plan_table.py --only ''            # no compilation: the table again from the results kept

Each row is `gpt-jax plan --json` in a process of its own. Results are kept in docs/plan_table.jsonl.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "docs" / "plan_table.jsonl", ROOT / "docs" / "PODS.md"
BEGIN, END = "<!-- plan_table: begin -->", "<!-- plan_table: end -->"

# (config, topology, keys that differ from the config)
ROWS = [
    ("gpt3_125m", "v5e:4x4", "microbatches=4"),
    ("gpt3_350m", "v5e:4x4", "microbatches=8"),
    ("gpt3_760m", "v5e:4x8", "microbatches=4"),
    ("gpt3_1b3", "v5e:8x8", "microbatches=4"),
    ("gpt3_2b7", "v5e:8x16", "microbatches=4"),
    ("gpt3_6b7", "v5e:16x16", "microbatches=4"),
    ("gpt3_13b", "v5p:4x8x8", ""),
    ("gpt3_175b", "v5p:8x16x16", ""),
    ("llama2_7b", "v5p:4x4x8", "microbatches=4"),
    ("llama2_70b", "v5p:8x8x16", "microbatches=4"),
    ("gpt3_125m", "h100:1x8", "microbatches=4"),
    ("gpt3_350m", "h100:1x8", "microbatches=4"),
    ("gpt3_760m", "h100:2x8", "microbatches=4"),
    ("gpt3_1b3", "h100:4x8", "microbatches=4"),
    ("gpt3_2b7", "h100:8x8", "microbatches=2"),
    ("gpt3_6b7", "h100:16x8", "microbatches=2"),
    ("gpt3_13b", "h100:32x8", ""),
    ("gpt3_175b", "h100:128x8", "microbatches=2"),
    ("llama2_7b", "h100:16x8", "microbatches=4"),
    ("llama2_70b", "h100:64x8", "microbatches=4"),
]


def command(config: str, topology: str, keys: str) -> list[str]:
    """The command of a row, without the interpreter: of the full batch, which GPT-3's grow to."""
    keys = f"batch_schedule=() {keys}"
    return ["plan", f"--config={config}", "--topology", topology, *(f"--config.{key}" for key in keys.split())]


def run(row: tuple[str, str, str]) -> dict:
    """Plans one row."""
    full = [sys.executable, "-m", "gpt_jax.cli", *command(*row), "--json", "--no-advice"]
    done = subprocess.run(full, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command(*row))}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"keys": row[2]}


def key_of(result: dict) -> tuple[str, str]:
    return result["config"], result["topology"]


def table(results: dict[tuple[str, str], dict]) -> str:
    """Markdown of all rows that have a result."""
    lines = [
        "| config | machine | chips | mesh fsdp x tensor | micro-batches x rows a shard "
        "| memory a chip, GiB: state + rest = sum of capacity | fits | sent a chip and step, GB "
        "| ms at least: compute, HBM, link, network | MFU at most "
        "| compiled in s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    gib = 2**30
    for config, topology, _ in ROWS:
        r = results.get((config, topology))
        if r is None:
            continue
        times = ", ".join(f"{1e3 * r['roofline_s'][k]:,.0f}" for k in ("compute", "hbm", "link", "network"))
        pieces = r["keys"].partition("microbatches=")[2].split(" ")[0] or "1"
        lines.append(
            f"| {config} ({r['params'] / 1e9:.3g}B) | {topology} | {r['chips']:,} "
            f"| {r['mesh']['fsdp']} x {r['mesh']['tensor']} | {pieces} x {r['batch_per_shard']} "
            f"| {r['state_bytes_per_chip'] / gib:.2f} + {r['temporary_bytes_per_chip'] / gib:.2f} = "
            f"{r['hbm_bytes_per_chip'] / gib:.1f} of {r['hbm_capacity_bytes'] / gib:.1f} "
            f"| {'yes' if r['fits'] else '**no**'} | {r['collective_bytes'] / 1e9:,.1f} | {times} "
            f"| {r['mfu_bound']:.0%} | {r['compile_s']:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=None, help="configs, or config@topology, comma-separated")
    parser.add_argument("--missing", action="store_true", help="only rows that have no result yet")
    args = parser.parse_args()
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    results = {key_of(r): r for r in map(json.loads, lines)}
    only = None if args.only is None else args.only.split(",")
    for row in ROWS:
        if only is not None and row[0] not in only and f"{row[0]}@{row[1]}" not in only:
            continue
        if args.missing and row[:2] in results:
            continue
        result = run(row)
        results[key_of(result)] = result
        print(f"{' '.join(command(*row))}: fits {result['fits']}, {result['hbm_bytes_per_chip'] / 2**30:.1f} GiB, "
              f"{result['compile_s']} s", flush=True)  # fmt: skip
        ordered = [results[row[:2]] for row in ROWS if row[:2] in results]
        RESULTS.write_text("".join(json.dumps(r) + "\n" for r in ordered))
    text = PAGE.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n{table(results)}\n{END}{tail}")
    print(json.dumps({"rows": len(results), "all_fit": all(r["fits"] for r in results.values())}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
