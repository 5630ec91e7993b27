"""The command `gpt-jax rerun`: repeats the first steps of a run and says whether every number is the same bits."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from gpt_jax.config import resolve
from gpt_jax.config_changes import DATA, moves_numbers, undo
from gpt_jax.errors import UserError
from gpt_jax.forensics.spikes import jsonable
from gpt_jax.inherit import saved_config, saved_run
from gpt_jax.metrics import read_rows
from gpt_jax.run import Run, build_run
from gpt_jax.train import initial_state
from gpt_jax.workdir import describe_environment, open_workdir

_PLACE = ("mesh.", "distributed.")  # keys that say where a run runs, not what it does


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("workdir", help="the run; nothing in it is changed")
    parser.add_argument("--steps", type=int, default=20, help="how many steps to repeat")


def main(args: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs the command: exit code 0 if all numbers are the same, else 1."""
    if overrides:
        raise UserError(f"rerun takes no --config.{next(iter(overrides))}: it repeats what the run did.")
    if args.steps < 1:
        raise UserError(f"--steps is {args.steps}; it must be at least 1.")
    result = rerun(args.workdir, args.steps)
    for name, (then, now) in result["environment"].items():
        print(f"differs: {name}: {then!r} -> {now!r}")
    if result["same"]:
        print(f"the first {result['steps']} steps are the same, bit for bit: {result['compared']} numbers")
    else:
        first = result["first_difference"]
        print(
            f"differs from step {first['step']} on: {first['name']} was {first['then']!r}, is {first['now']!r}; "
            f"at most {result['largest_relative']:.2g}, relative"
        )
    print(json.dumps(jsonable({"workdir": args.workdir, **result})))
    return 0 if result["same"] else 1


def rerun(workdir: str, steps: int) -> dict[str, Any]:
    """Repeats steps from the start of a run.

    Returns:
      {"steps": how many; "same": whether all recorded training numbers are equal; "compared": how many numbers;
      "first_difference", "largest_relative": where they are not; "environment": {what: [then, now]} that differs}.

    Raises:
      UserError: no run there, none of its first steps is recorded, or it went on with other settings among them.
    """
    recorded, changes = read_recorded(workdir)
    last = min(steps, max(recorded, default=0))
    rows = {step: row for step, row in recorded.items() if step <= last}
    if not rows:
        raise UserError(f"{workdir!r} has recorded no step up to {steps}: there is nothing to compare with.")
    check_unbroken(changes, 0, last, f"{workdir!r}, --steps={last}")
    run = run_at(workdir, last, changes)
    state = initial_state(run, lambda line: None)
    compared, first, largest = 0, None, 0.0
    with run.loader(lambda: state.all_params, 0, lambda line: None, stop=last) as loader:
        for index, batch in loader:
            state, metrics = run.step(state, batch)
            found = differences(rows.get(index + 1, {}), metrics)
            compared += len([name for name in rows.get(index + 1, {}) if name.startswith("train/")])
            for name, then, now in found:
                first = first or {"step": index + 1, "name": name, "then": then, "now": now}
                largest = max(largest, _relative(then, now))
    result = {"steps": last, "same": first is None, "compared": compared}
    if first is not None:
        result |= {"first_difference": first, "largest_relative": largest}
    moved: dict[str, list[Any]] = {}
    for after, of in changes:
        for key in of if after else ():
            if key.startswith(_PLACE):
                moved[key] = [moved.get(key, of[key])[0], of[key][1]]
    return result | {"environment": environment_changes(workdir, run) | moved}


def read_recorded(workdir: str) -> tuple[dict[int, dict[str, Any]], list[tuple[int, dict[str, Any]]]]:
    """Reads what a run's directory tells of its past.

    Returns:
      (rows by step; (step, {key: [old, new]}) of the changes that it was continued with after a step, oldest first).
    """
    saved_config(workdir)
    with open_workdir(workdir, lock=False) as directory:
        rows, history = read_rows(directory.metrics_path), directory.history()
    changes, since = [], math.inf
    for entry in reversed(history):
        if entry["event"] in ("start", "resume", "change"):
            since = min(since, entry["step"])  # whoever goes on from an earlier step does what came after it again
        if entry["event"] == "change":
            changes.append((since, entry["changes"]))
    return {row["step"]: row for row in rows}, changes[::-1]


def run_at(workdir: str, step: int, changes: Sequence[tuple[int, Mapping[str, Any]]]) -> Run:
    """Rebuilds a run as it was at a step (counted from 1): later changes are undone, but for the mesh.

    Raises:
      UserError: its data were others then.
    """
    tree = saved_config(workdir)
    for after, of in reversed(changes):
        if after < step:
            break
        if DATA in of:
            raise UserError(
                f"{workdir!r}: the content of its data changed after step {after}; step {step} had other data."
            )
        tree = undo(tree, {key: values for key, values in of.items() if not key.startswith(_PLACE)})
    _, tokenizer = saved_run(workdir)
    return build_run(resolve(tree), lambda line: None, tokenizer)


def check_unbroken(changes: Sequence[tuple[int, Mapping[str, Any]]], start: int, step: int, what: str) -> None:
    """Raises UserError if the run went on with other settings between two of the steps from `start` (not itself) on to
    `step`: they are no one run."""
    for after, of in changes:
        told = [f"{key}: {old!r} -> {new!r}" for key, (old, new) in of.items() if _counts(key)]
        if start < after < step and told:
            raise UserError(
                f"{what}: the run went on from step {after} with {'; '.join(told)}; ask for {after} at most."
            )


def _counts(key: str) -> bool:
    return moves_numbers(key) and not key.startswith(_PLACE)


def differences(row: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(name, then, now) of the training numbers of a row that are not the same."""
    now = {f"train/{name}": float(value) for name, value in jax.device_get(dict(metrics)).items()}
    out = []
    for name, then in row.items():
        if name in now and not (then == now[name] or (math.isnan(then) and math.isnan(now[name]))):
            out.append((name, then, now[name]))
    return out


def environment_changes(workdir: str, run: Run) -> dict[str, list[Any]]:
    """What a result depends on beside the config that is not as the run recorded it: code, versions, devices, data."""
    with open_workdir(workdir, lock=False) as directory:
        then = directory.read_json("environment.json") or {}
    now = json.loads(json.dumps({**describe_environment(), "data": run.data.info}))
    out = {}
    for key in ("code", "python", "packages", "devices", "variables", "data"):
        before, after = _flat(then.get(key, {})), _flat(now.get(key, {}))
        for name in dict.fromkeys([*before, *after]):
            label = f"{key}.{name}" if name else key
            if before.get(name) != after.get(name) and not label.endswith((".store", "devices.cpu_cores")):
                out[label] = [before.get(name), after.get(name)]
    return out


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {prefix: node}
    out: dict[str, Any] = {}
    for key, value in node.items():
        out |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def _relative(a: float, b: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b), 1e-30)
