#!/usr/bin/env python3
"""A fine-tuned model's score against the tokens of input that it may see, by what is kept of a longer input.

    python scripts/input_budget.py --workdir=runs/tasks/squad-pretrained-0 --budgets=16,32,64,128,256
    python scripts/input_budget.py --workdir=runs/tasks/scitldr-pretrained-0 --end=$'\\nTL;DR:\\n' --max-generated=200

Each cell is `gpt-jax eval` of the run's own task on its test split, through the task `shortened`: nothing is trained
anew. Policies: left drops the beginning, right the end, head_tail the middle. A table for people, then a line of JSON;
--figure draws it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a fine-tuned run of one task")
    parser.add_argument("--metric", default="", help="of the task; default: its last")
    parser.add_argument("--budgets", default="16,32,64,128,256", help="tokens, comma-separated")
    parser.add_argument("--policies", default="left,right,head_tail", help="comma-separated")
    parser.add_argument("--end", default="", help="the source from here on is not cut")
    parser.add_argument("--limit", type=int, default=0, help="test examples; 0 is all")
    parser.add_argument("--max-generated", type=int, default=0, help="examples generated for; 0 is all")
    parser.add_argument("--figure", default="", help="PNG to draw")
    args = parser.parse_args()
    workdir = pathlib.Path(args.workdir)
    config = json.loads((workdir / "config.json").read_text())
    tasks = config["data"]["tasks"]
    if len(tasks) != 1:
        parser.error(f"--workdir is {args.workdir!r}, a run of {len(tasks)} tasks; one of a single task is needed.")
    (task,) = tasks
    name = task if isinstance(task, str) else task["name"]
    budgets, policies = [int(b) for b in args.budgets.split(",")], args.policies.split(",")
    scores = {policy: [] for policy in policies}
    for policy in policies:
        for budget in budgets:
            spec = dict(name="shortened", task=task, tokenizer=str(workdir / "tokenizer"), budget=budget)
            spec |= dict(policy=policy, end=args.end) | (dict(limit={"test": args.limit}) if args.limit else {})
            command = [sys.executable, "-m", "gpt_jax.cli", "eval", f"--workdir={workdir}"]
            command += ["--config.data.valid_split=test", f"--config.data.tasks={(spec,)!r}"]
            command += [f"--max-generated={args.max_generated}"] if args.max_generated else []
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"input_budget: {(done.stderr.strip().splitlines() or [done.returncode])[-1]}")
            found = {
                k: v for k, v in json.loads(done.stdout.strip().splitlines()[-1]).items() if k.startswith("valid/")
            }
            plain = [k for k in found if k.count("/") == 1 and "loss" not in k and "nll" not in k]
            metric = f"valid/{args.metric or plain[-1].removeprefix('valid/')}"
            scores[policy].append(found[metric])
            print(f"{name}, {policy}, {budget} tokens: {metric} {found[metric]:.2f}", file=sys.stderr, flush=True)
    print(f"| {name}, {metric.removeprefix('valid/')} | " + " | ".join(map(str, budgets)) + " |")
    print("|---" * (len(budgets) + 1) + "|")
    for policy, row in scores.items():
        print(f"| {policy} | " + " | ".join(f"{x:.1f}" for x in row) + " |")
    if args.figure:
        draw(args.figure, budgets, scores, f"{name}: {metric.removeprefix('valid/')}")
    print(json.dumps({"task": name, "metric": metric.removeprefix("valid/"), "budgets": budgets, "scores": scores}))
    return 0


def draw(path: str, budgets: list[int], scores: dict[str, list[float]], label: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5))
    for policy, row in scores.items():
        axes.plot(
            budgets, row, marker="o", label=f"{policy} is dropped" if policy != "head_tail" else "middle is dropped"
        )
    axes.set(xscale="log", xlabel="input budget (tokens)", ylabel=label)
    axes.set_xticks(budgets, list(map(str, budgets)))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
