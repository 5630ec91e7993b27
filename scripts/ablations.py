#!/usr/bin/env python3
"""Runs every ablation of configs/ablations, or some, and writes their tables into docs/ABLATIONS.md.

    python scripts/ablations.py --workdir runs/ablations                        # about four hours of one core
    python scripts/ablations.py --workdir runs/ablations --only ffn,vocabulary
    python scripts/ablations.py --workdir runs/ablations --tables               # what is done, nothing run

Each is `gpt-jax ablate --config=ablations/NAME --workdir=WORKDIR/NAME`: cells that are done are kept. What the tables
mean is written by hand beside them, and kept. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.files import atomic_write
from gpt_jax.remote import refuse_url

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "ABLATIONS.md"


def table(summary: Mapping[str, Any]) -> str:
    """Markdown of an ablation's results: a row per metric and arm, bold where the arm differs (Holm's test)."""
    lines = ["| metric | arm | seeds | mean | difference (95%) | p (Holm) |", "|---|---|---:|---:|---|---:|"]
    for metric, arms in summary["results"].items():
        for arm, found in arms.items():
            gap = p = ""
            if "difference" in found:
                gap = f"{found['difference']:+.4f} ({found['difference_low']:+.4f} to {found['difference_high']:+.4f})"
                gap = f"**{gap}**" if found["differs"] else gap
                p = "<0.0001" if found["p_holm"] < 1e-4 else f"{found['p_holm']:.4f}"
            lines.append(f"| {metric} | {arm} | {found['n']} | {found['mean']:.4f} | {gap} | {p} |")
    missing = len(summary["missing"]) + len(summary["mismatched"]) + len(summary["failed"])
    return "\n".join(lines) + (f"\n\n{missing} of {summary['cells']} cells are missing." if missing else "")


def replace_block(text: str, name: str, content: str) -> str:
    """The page with another table between the marks of this name, or with a new section at its end."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if begin not in text:
        return f"{text.rstrip()}\n\n## {name}\n\n{begin}\n{content}\n{end}\n"
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/ablations")
    parser.add_argument("--only", default="", help="comma-separated names; default: all")
    parser.add_argument("--tables", action="store_true", help="run nothing: write the tables of what is done")
    args = parser.parse_args()
    names = sorted(path.stem for path in (ROOT / "configs" / "ablations").glob("*.py"))
    wanted = [name.strip() for name in args.only.split(",") if name.strip()] or names
    for name in wanted:
        if name not in names:
            parser.error(f"--only has {name!r}; allowed: {', '.join(names)}.")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        refuse_url(args.workdir, "--workdir", "give a folder, or a mounted bucket's")
    except UserError as error:
        parser.error(str(error))
    done, failed = [], []
    for name in wanted:
        folder = pathlib.Path(args.workdir) / name
        if not args.tables:
            command = ["-m", "gpt_jax.cli", "ablate", f"--config=ablations/{name}", f"--workdir={folder}"]
            if subprocess.run([sys.executable, *command], stdout=sys.stderr).returncode:
                failed.append(name)
                continue
        if (folder / "summary.json").exists():
            summary = json.loads((folder / "summary.json").read_text())
            atomic_write(PAGE, replace_block(PAGE.read_text(), name, table(summary)))
            done.append(name)
    print(json.dumps({"tables": done, "failed": failed, "page": str(PAGE)}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
