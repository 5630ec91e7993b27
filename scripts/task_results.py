#!/usr/bin/env python3
"""Fine-tunes a pre-trained model on real tasks, row by row, and prints the table of test scores.

    gpt-jax train --config=novels_3m --workdir=runs/novels
    python scripts/task_results.py --base=runs/novels --out=runs/tasks            # every row; done ones are skipped
    python scripts/task_results.py --base=runs/novels --out=runs/tasks --rows=sst2,e2e --hours=2
    python scripts/task_results.py --out=runs/tasks --table                       # the table of what is there

Each row is a run of `gpt-jax train` and an evaluation of `gpt-jax eval` on the test split; results.jsonl has the
command. 'scratch' is the same model, tokenizer, data and steps without the pre-trained weights; where both have several
seeds, their difference is given with a 95% interval (Student's t over paired seeds). The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

RESULTS = "results.jsonl"


@dataclasses.dataclass(frozen=True)
class Row:
    """A run: its config, what is overridden, and which of its scores counts."""

    name: str
    config: str
    metric: str
    overrides: tuple[str, ...] = ()
    seeds: int = 1
    scratch: bool = False
    flags: tuple[str, ...] = ()  # of its evaluation


def alone(config: str, part: str) -> tuple[str, ...]:
    """The overrides that leave of a mixture's config one part, with its rows, coefficient and data as they are."""
    from gpt_jax.config import load

    options = thaw(load(config).objective["tasks"][part])
    return (f"--config.objective.tasks={ ({part: options})!r}", f"--config.batch_size={options['rows']}")


def thaw(value: Any) -> Any:
    """A config's frozen mapping as plain dicts, whose text reads back."""
    return {k: thaw(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def rows() -> tuple[Row, ...]:
    """Every row of the table."""
    causal, four, joint = ("--config.objective.mask=causal",), "tasks/four", "tasks/squad_joint"
    # Four tasks of four kinds in one update, beside each by itself: at the steps of the four together, of which each
    # task's sub-batch is in every one (equal steps per task), and at a quarter of them (equal steps in all).
    of_four = (("sst2", "accuracy"), ("wnut17", "entity_f1"), ("squad", "f1"), ("e2e", "bleu"))
    quarter = ("--config.steps=75",)
    # One passage, three objectives: the span, the question, the text; beside each by itself.
    # What is written counts for the question alone.
    of_joint = (("span", "f1", ()), ("question", "bleu", ()), ("text", "nll", ("--max-generated=1",)))
    return (
        Row("sst2", "tasks/sst2", "accuracy", seeds=3, scratch=True),
        Row("ag_news", "tasks/ag_news", "accuracy", seeds=3, scratch=True),
        Row("e2e", "tasks/e2e", "bleu", seeds=3, scratch=True),
        Row("wnut17", "tasks/wnut17", "entity_f1"),
        Row("squad", "tasks/squad", "f1"),
        Row("multi30k", "tasks/multi30k", "bleu"),
        Row("multi30k (causal)", "tasks/multi30k", "bleu", causal),
        Row("scitldr", "tasks/scitldr", "rougeL"),
        Row("scitldr (causal)", "tasks/scitldr", "rougeL", causal),
        Row("babi", "tasks/babi", "accuracy"),
        Row("four", four, "sst2/accuracy"),
        *(Row(f"four: {part} alone", four, metric, alone(four, part)) for part, metric in of_four),
        *(Row(f"four: {p} alone (a quarter)", four, metric, alone(four, p) + quarter) for p, metric in of_four),
        Row("joint", joint, "span/f1"),
        *(Row(f"joint: {p} alone", joint, metric, alone(joint, p), flags=flags) for p, metric, flags in of_joint),
    )


def config_hash(row: Row) -> str:
    """Of everything that a row trains with but its start and seed."""
    from gpt_jax.config import load, to_dict
    from gpt_jax.data.cache import content_hash

    keys = dict(text.removeprefix("--config.").split("=", 1) for text in row.overrides)
    return content_hash(json.loads(json.dumps(to_dict(load(row.config, keys)))))


def run(command: list[str], log: pathlib.Path) -> dict:
    """Runs a command and returns the JSON of its last line; 75 (stopped) is run again."""
    while True:
        with log.open("a") as file:
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True)
            file.write(done.stdout)
        if done.returncode == 0:
            return json.loads(done.stdout.strip().splitlines()[-1])
        if done.returncode != 75:
            raise SystemExit(f"task_results: {shlex.join(command)} failed with {done.returncode}; see {log}.")


def cells(rows: list[Row]) -> list[tuple[Row, str, int]]:
    """Returns (row, start, seed) of every run, seeds outermost, so that an interrupted table is even."""
    found = []
    for seed in range(max(row.seeds for row in rows)):
        for row in rows:
            if seed < row.seeds:
                found += [(row, start, seed) for start in ("pretrained", *(["scratch"] if row.scratch else []))]
    return found


def measure(row: Row, start: str, seed: int, base: pathlib.Path, out: pathlib.Path) -> dict:
    """Trains and tests one cell; returns its entry in the table's file."""
    workdir = out / f"{'-'.join(re.findall(r'[a-z0-9_]+', row.name))}-{start}-{seed}"
    command = [sys.executable, "-m", "gpt_jax.cli", "train", f"--config={row.config}", f"--workdir={workdir}"]
    command += [f"--config.seed={seed}", *row.overrides]
    if start == "pretrained":
        command.append(f"--config.init.from={base}")
    else:
        command.append(f"--config.data.tokenizer.path={base / 'tokenizer'}")
    begun = time.monotonic()
    run(command, out / f"{workdir.name}.log")
    trained = time.monotonic() - begun
    test = [sys.executable, "-m", "gpt_jax.cli", "eval", f"--workdir={workdir}", "--config.data.valid_split=test"]
    test += row.flags
    scores = run(test, out / f"{workdir.name}.log")
    return {
        "row": row.name,
        "start": start,
        "seed": seed,
        "config": config_hash(row),
        "metric": row.metric,
        "score": next(v for k, v in scores.items() if k == f"valid/{row.metric}" or k.endswith(f"/{row.metric}")),
        "scores": {k.removeprefix("valid/"): v for k, v in scores.items() if k.startswith("valid/")},
        "train_seconds": round(trained),
        "seconds": round(time.monotonic() - begun),
        "command": shlex.join(["gpt-jax", *command[3:]]),
    }


def table(results: list[dict]) -> tuple[str, dict]:
    """Returns the table as markdown and its figures."""
    from scipy import stats

    lines = [
        "| task | metric (test) | pre-trained | scratch | difference (95%) | seeds | s |",
        "|---|---|---|---|---|---|---|",
    ]
    figures = {}
    for name in dict.fromkeys(r["row"] for r in results):
        mine = [r for r in results if r["row"] == name]
        by = {s: {r["seed"]: r["score"] for r in mine if r["start"] == s} for s in ("pretrained", "scratch")}
        digits = 1 if max(r["score"] for r in mine) > 1 else 3  # scores run to 100 or to 1
        shown = {s: f"{statistics.mean(v.values()):.{digits}f}" if v else "" for s, v in by.items()}
        paired = [by["pretrained"][k] - v for k, v in by["scratch"].items() if k in by["pretrained"]]
        gap = ""
        if len(paired) > 1:
            mean = statistics.mean(paired)
            half = stats.t.ppf(0.975, len(paired) - 1) * statistics.stdev(paired) / math.sqrt(len(paired))
            gap = f"{mean:+.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})"
        seconds = round(statistics.mean(r["seconds"] for r in mine))
        lines.append(
            f"| {name} | {mine[0]['metric']} | {shown['pretrained']} | {shown['scratch']} | {gap} | "
            f"{len(by['pretrained'])} | {seconds} |"
        )
        figures[name] = {"metric": mine[0]["metric"], **{s: list(v.values()) for s, v in by.items()}, "gap": gap}
    return "\n".join(lines), figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="", help="workdir of the pre-trained run")
    parser.add_argument("--out", default="runs/tasks", help="folder of the runs and their results")
    parser.add_argument("--rows", default="", help="comma-separated names of rows; default: all")
    parser.add_argument("--hours", type=float, default=0.0, help="start no further run after so many hours")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    table_rows = rows()
    names = {row.name for row in table_rows}
    wanted = [name.strip() for name in args.rows.split(",") if name.strip()] or list(names)
    for name in wanted:
        if name not in names:
            parser.error(f"--rows has {name!r}; allowed: {', '.join(row.name for row in table_rows)}.")
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / RESULTS
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not args.table:
        if not args.base or not (pathlib.Path(args.base) / "checkpoints").is_dir():
            parser.error(f"--base is {args.base!r}; it must be the workdir of a finished run.")
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        begun, done = time.monotonic(), {(r["row"], r["start"], r["seed"]) for r in results}
        hashes = {row.name: config_hash(row) for row in table_rows}
        for r in results:
            if r.get("config") != hashes.get(r["row"]):
                parser.error(
                    f"{path} has {r['row']!r} of another config than today's: give another --out, or delete it."
                )
        for row, start, seed in cells([row for row in table_rows if row.name in wanted]):
            late = args.hours and time.monotonic() - begun > 3600 * args.hours
            if late or (row.name, start, seed) in done:
                continue
            results.append(measure(row, start, seed, pathlib.Path(args.base).absolute(), out))
            with path.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
            print(f"{row.name}, {start}, seed {seed}: {results[-1]['score']:.4f}", file=sys.stderr, flush=True)
    text, figures = table(results)
    print(text)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
