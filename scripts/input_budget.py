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
import subprocess
import sys
from typing import Any

from gpt_jax.errors import UserError, choose
from gpt_jax.inherit import saved_config


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a fine-tuned run of one task")
    parser.add_argument("--metric", default="", help="of the task; default: its last")
    parser.add_argument("--budgets", type=numbers, default="16,32,64,128,256", help="tokens, comma-separated")
    parser.add_argument("--policies", default="left,right,head_tail", help="comma-separated")
    parser.add_argument("--end", default="", help="the source from here on is not cut")
    parser.add_argument("--limit", type=int, default=0, help="test examples; 0 is all")
    parser.add_argument("--max-generated", type=int, default=0, help="examples generated for; 0 is all")
    parser.add_argument("--figure", default="", help="PNG to draw")
    args = parser.parse_args(argv)
    tasks, budgets, policies = saved_config(args.workdir)["data"]["tasks"], args.budgets, args.policies.split(",")
    if len(tasks) != 1:
        raise UserError(f"--workdir is {args.workdir!r}, a run of {len(tasks)} tasks; one of a single task is needed.")
    task = tasks[0] if isinstance(tasks[0], str) else dict(tasks[0])
    name = task if isinstance(task, str) else task["name"]
    scores: dict[str, list[float]] = {policy: [] for policy in policies}
    for policy in policies:
        for budget in budgets:
            found = evaluate(args, task, budget, policy)
            metric = args.metric or list(found)[-1]
            choose("--metric", metric, found)
            scores[policy].append(found[metric])
            print(f"{name}, {policy}, {budget} tokens: {metric} {found[metric]:.3f}", file=sys.stderr, flush=True)
    digits = 1 if max(map(max, scores.values())) > 1 else 3  # scores run to 100 or to 1
    print(f"| {name}, {metric} | " + " | ".join(map(str, budgets)) + " |")
    print("|---" * (len(budgets) + 1) + "|")
    for policy, row in scores.items():
        print(f"| {policy} | " + " | ".join(f"{x:.{digits}f}" for x in row) + " |")
    if args.figure:
        draw(args.figure, budgets, scores, f"{name}: {metric}")
    print(json.dumps({"task": name, "metric": metric, "budgets": budgets, "scores": scores}))
    return 0


def numbers(text: str) -> list[int]:
    """'16,32' -> [16, 32]."""
    return [int(word) for word in text.split(",")]


def evaluate(args: argparse.Namespace, task: Any, budget: int, policy: str) -> dict[str, float]:
    """Returns the task's metrics over all its groups, by `gpt-jax eval` of the run with shortened inputs."""
    spec = dict(name="shortened", task=task, tokenizer=f"{args.workdir}/tokenizer", budget=budget)
    spec |= dict(policy=policy, end=args.end) | (dict(limit={"test": args.limit}) if args.limit else {})
    command = [sys.executable, "-m", "gpt_jax.cli", "eval", f"--workdir={args.workdir}"]
    command += ["--config.data.valid_split=test", f"--config.data.tasks={(spec,)!r}"]
    command += [f"--max-generated={args.max_generated}"] if args.max_generated else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            (done.stderr.strip().splitlines() or [f"the evaluation ended with {done.returncode}"])[-1].removeprefix(
                "gpt-jax: "
            )
        )
    values = json.loads(done.stdout.strip().splitlines()[-1])
    plain = (k for k in values if k.startswith("valid/") and k.count("/") == 1 and "loss" not in k and "nll" not in k)
    return {key.removeprefix("valid/"): values[key] for key in plain}


def draw(path: str, budgets: list[int], scores: dict[str, list[float]], label: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5))
    dropped = {"left": "the beginning", "right": "the end", "head_tail": "the middle"}
    for policy, row in scores.items():
        axes.plot(budgets, row, marker="o", label=f"without {dropped[policy]}")
    axes.set(xscale="log", xlabel="input budget (tokens)", ylabel=label)
    axes.set_xticks(budgets, list(map(str, budgets)))
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"input_budget: {error}", file=sys.stderr)
        sys.exit(1)
