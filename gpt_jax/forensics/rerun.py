"""The command `gpt-jax rerun`: repeats the first steps of a run and says whether every number is the same bits."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from typing import Any

import jax

from gpt_jax.errors import UserError
from gpt_jax.forensics.spikes import jsonable
from gpt_jax.metrics import read_rows
from gpt_jax.run import Run, rebuild_run
from gpt_jax.train import initial_state
from gpt_jax.workdir import describe_environment, open_workdir


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
      UserError: no run there, or none of its first steps is recorded.
    """
    run, recorded = open_recorded(workdir)
    last = min(steps, max(recorded, default=0), run.config.steps)
    rows = {step: row for step, row in recorded.items() if step <= last}
    if not rows:
        raise UserError(f"{workdir!r} has recorded no step up to {steps}: there is nothing to compare with.")
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
    return result | {"environment": environment_changes(workdir, run)}


def open_recorded(workdir: str) -> tuple[Run, dict[int, dict[str, Any]]]:
    """Rebuilds a run and reads its rows by step."""
    run = rebuild_run(workdir)
    with open_workdir(workdir, lock=False) as directory:
        return run, {row["step"]: row for row in read_rows(directory.metrics_path)}


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
