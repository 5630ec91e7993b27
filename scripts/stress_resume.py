#!/usr/bin/env python3
"""Kills a real training run again and again, resumes it each time, and compares it with one left alone.

    python scripts/stress_resume.py --kills=24

Shows, on a small model and the embedded corpus: every value but perf/* is bitwise that of the uninterrupted run; no
checkpoint is ever unreadable; a run begun on one device goes on on eight simulated ones, and the reverse, with the same
batches and losses; a skipped range of batches leaves exactly the others, in order, also after a kill.
The last line of output is JSON; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt_jax.checkpoint import list_steps, verify  # noqa: E402
from gpt_jax.metrics import read_rows  # noqa: E402
from gpt_jax.workdir import EXIT_PREEMPTED  # noqa: E402

# Small enough that a step takes milliseconds: most moments lie in a save or at a start.
SMALL = {
    "context_length": 32,
    "batch_size": 8,
    "model.num_layers": 2,
    "model.d_model": 32,
    "model.num_heads": 2,
    "model.dropout": 0.1,
    "data.tokenizer.kind": "byte",
    "data.tokenizer.specials": "('eot',)",
    "optimizer.schedule": "constant",
    "optimizer.warmup": "10",
    "optimizer.ema": 0.99,
    "eval.every_steps": 25,
    "eval.max_batches": 1,
    "checkpoint.every_steps": 5,
    "log.tensorboard": False,
    "sample.prompts": "()",
    "objective": "{'name': 'causal_lm'}",
}
REWEIGHTED = {"objective": "{'name': 'causal_lm', 'reweight': 'perplexity', 'z_loss': 1e-4}"}
STILL = {"optimizer.learning_rate": 0.0, "model.dropout": 0.0}  # the loss is a function of the batch alone
TEMPORARY = "*.orbax-checkpoint-tmp*"


def start(workdir: pathlib.Path, settings: Mapping[str, Any], devices: int = 1, flags: Sequence[str] = ()) -> Any:
    """Starts `gpt-jax train` on simulated CPU devices; its output goes to a file beside the run directory."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    overrides = [f"--config.{key}={value}" for key, value in (SMALL | dict(settings)).items()]
    command = [sys.executable, "-m", "gpt_jax.cli", "train", "--config=causal_lm", f"--workdir={workdir}"]
    with open(workdir.with_suffix(".log"), "a") as log:
        return subprocess.Popen([*command, *overrides, *flags], env=environment, stdout=log, stderr=log, cwd=ROOT)


def train(workdir: pathlib.Path, settings: Mapping[str, Any], devices: int = 1, flags: Sequence[str] = ()) -> None:
    """Trains to the end; raises with the end of its output if it fails."""
    code = start(workdir, settings, devices, flags).wait()
    if code:
        raise RuntimeError(f"exit code {code}:\n" + workdir.with_suffix(".log").read_text()[-3000:])


def values(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows without perf/*."""
    rows = read_rows(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def losses(workdir: pathlib.Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in values(workdir)}


def kill_and_resume(
    workdir: pathlib.Path, settings: Mapping[str, Any], kills: int, draw: random.Random, say: Callable[[str], None]
) -> dict[str, int]:
    """Runs to the end through `kills` kills at random moments; returns how many fell where, and what was found.

    A third of them come while the process starts, a third while it trains, a third during a save. One in six is
    SIGTERM, which must save and exit with 75; the others are SIGKILL. After each, every checkpoint is read in full.
    """
    found = {"kills": 0, "at_start": 0, "in_training": 0, "in_a_save": 0, "preempted": 0, "unreadable": 0}
    checkpoints = workdir / "checkpoints"
    while True:
        process = start(workdir, settings)
        where = ("at_start", "in_training", "in_a_save")[found["kills"] % 3]
        if found["kills"] < kills:
            before = latest(checkpoints)
            if where == "at_start":
                wait_for(lambda: False, process, draw.uniform(0.3, 5.0))
            else:
                wait_for(lambda b=before: latest(checkpoints) > b, process, 120)
                wait_for(lambda: False, process, draw.uniform(0, 1.0))
                if where == "in_a_save":
                    wait_for(lambda: any(checkpoints.glob(TEMPORARY)), process, 30)
                    time.sleep(draw.uniform(0, 0.02))
            if process.poll() is not None and process.returncode:
                raise RuntimeError(workdir.with_suffix(".log").read_text()[-3000:])
            terminate = found["kills"] % 6 == 4
            process.send_signal(signal.SIGTERM if terminate else signal.SIGKILL)
            in_a_save = where != "at_start" and any(checkpoints.glob(TEMPORARY))
        code = process.wait()
        if code == 0:
            return found
        found["kills"] += 1
        found["in_a_save" if in_a_save and not terminate else "in_training" if where != "at_start" else where] += 1
        found["preempted"] += code == EXIT_PREEMPTED
        if code not in (-signal.SIGKILL, -signal.SIGTERM, EXIT_PREEMPTED):
            raise RuntimeError(f"exit code {code}:\n" + workdir.with_suffix(".log").read_text()[-3000:])
        problems = [
            f"{step}: {verify(checkpoints, step)}" for step in list_steps(checkpoints) if verify(checkpoints, step)
        ]
        found["unreadable"] += len(problems)
        say(f"kill {found['kills']:2d} {where}, code {code}, at checkpoint {latest(checkpoints)} {' '.join(problems)}")


def latest(checkpoints: pathlib.Path) -> int:
    return max(list_steps(checkpoints), default=0)


def wait_for(condition: Callable[[], bool], process: Any, seconds: float) -> None:
    """Waits until the condition holds, the process has ended or the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not condition():
        time.sleep(0.002)


def check_kills(folder: pathlib.Path, kills: int, steps: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Compares a run killed again and again with one left alone."""
    settings = REWEIGHTED | {"steps": steps}
    train(folder / "alone", settings)
    found = kill_and_resume(folder / "killed", settings, kills, random.Random(seed), say)
    expected, got = values(folder / "alone"), values(folder / "killed")
    return found | {"steps": steps, "rows": len(got), "bitwise": got == expected and len(got) == steps}


def check_devices(folder: pathlib.Path, half: int) -> dict[str, Any]:
    """Moves a run from one device to eight and back at half its length; compares the losses of the other half.

    A second pair of runs has a learning rate of 0 and no dropout: there the loss is a function of the batch alone.
    """
    found: dict[str, Any] = {}
    for name, settings in (("moved", {}), ("batches", STILL)):
        for before, after in ((1, 8), (8, 1)):
            alone, moved = folder / f"{name}_{before}", folder / f"{name}_{before}_{after}"
            train(alone, settings | {"steps": 2 * half}, devices=before)
            train(moved, settings | {"steps": half}, devices=before)
            train(moved, settings | {"steps": 2 * half}, devices=after)
            a, b = losses(alone), losses(moved)
            assert len(a) == len(b) == 2 * half
            found[f"{name}_{before}_to_{after}"] = max(abs(a[s] - b[s]) for s in range(half + 1, 2 * half + 1))
    return found


def check_skip(folder: pathlib.Path, skip: tuple[int, int], steps: int) -> dict[str, Any]:
    """Runs with a range of batches skipped, killed once: with a learning rate of 0 a loss tells which batch it saw."""
    train(folder / "all", STILL | {"steps": steps})
    skipping = STILL | {"data.skip": f"[{skip}]", "steps": steps - (skip[1] - skip[0])}
    process = start(folder / "skipped", skipping)
    wait_for(lambda: latest(folder / "skipped" / "checkpoints") >= skip[0] - 10, process, 120)
    process.kill()
    process.wait()
    killed_at = latest(folder / "skipped" / "checkpoints")
    train(folder / "skipped", skipping)
    every, got = losses(folder / "all"), losses(folder / "skipped")
    remaining = [every[s] for s in sorted(every) if not skip[0] < s <= skip[1]]  # row s is of batch s - 1
    # The same range given to a run that is on its way, which is a change of data.
    train(folder / "changed", STILL | {"steps": skip[0] - 5})
    train(folder / "changed", skipping, flags=["--accept-changes"])
    changed = losses(folder / "changed")
    in_order = [got[s] for s in sorted(got)] == remaining and len(set(every.values())) == len(every)
    return {
        "skip_in_order": in_order,
        "skip_killed_at": killed_at,
        "skip_given_later": [changed[s] for s in sorted(changed)] == remaining,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--steps", type=int, default=600, help="of the killed run")
    parser.add_argument("--half", type=int, default=100, help="steps compared after a move to other devices")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="", help="where the runs go; default: a temporary folder")
    parser.add_argument("--only", choices=("kills", "devices", "skip"), default=None)
    args = parser.parse_args()
    began = time.monotonic()
    result: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(args.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if args.only in (None, "kills"):
            result |= check_kills(folder, args.kills, args.steps, args.seed, lambda line: print(line, flush=True))
        if args.only in (None, "devices"):
            result |= check_devices(folder, args.half)
        if args.only in (None, "skip"):
            result |= check_skip(folder, (40, 50), 70)
    failed = [k for k in ("bitwise", "skip_in_order", "skip_given_later") if not result.get(k, True)]
    failed += [k for k, v in result.items() if "_to_" in k and not v <= 1e-5]
    failed += ["unreadable"] if result.get("unreadable") else []
    failed += ["kills"] if result.get("kills", args.kills) < args.kills else []
    print(json.dumps(result | {"failed": failed, "seconds": round(time.monotonic() - began, 1)}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
