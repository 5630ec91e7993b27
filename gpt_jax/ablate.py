"""The command `gpt-jax ablate`: runs a grid of configs x paired seeds, compares the arms and writes the report."""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.ablation.cells import DONE, MISMATCHED, Stopped, cell_command, run_cell, run_here, run_processes
from gpt_jax.ablation.grid import Cell, cells_of, load_ablation
from gpt_jax.ablation.report import write_study
from gpt_jax.ablation.results import collect, compare_runs
from gpt_jax.errors import UserError
from gpt_jax.files import atomic_write
from gpt_jax.remote import refuse_url

_SLURM = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --output={workdir}/slurm-%a.log
#SBATCH --requeue
# Exit code 75 means 'stopped, run me again'. Afterwards: {collect}
{command} --cell="$SLURM_ARRAY_TASK_ID"
code=$?
if [ "$code" -eq 75 ]; then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"; fi
exit "$code"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--config", default="", metavar="FILE|NAME", help="an ablation file, e.g. ablations/ffn")
    parser.add_argument("--workdir", required=True, help="where cells and report go; what is done there is kept")
    parser.add_argument("--seeds", type=int, default=0, help="instead of the file's")
    parser.add_argument("--arm", action="append", default=[], help="only this arm and the baseline; may be repeated")
    parser.add_argument("--processes", type=int, default=1, help="cells that run at a time, each in its own process")
    parser.add_argument("--devices", default="", help="e.g. 0,1,2,3: one process at a time on each of these devices")
    parser.add_argument("--cell", type=int, default=None, metavar="INDEX", help="run this cell alone, no report")
    parser.add_argument("--emit", default="", metavar="slurm|lines", help="write a command per cell instead of running")
    parser.add_argument(
        "--collect", action="store_true", help="run nothing: report what has finished, name what has not"
    )
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="report runs started by hand instead")
    parser.add_argument("--metric", action="append", default=[], help="compare this metric instead of the file's")


def main(args: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs the command."""
    refuse_url(args.workdir, "--workdir of an ablation", "give a folder, or a mounted bucket's")
    workdir = pathlib.Path(args.workdir)
    if args.compare:
        if args.config or overrides:
            raise UserError("--compare takes finished runs: no --config.")
        study = compare_runs(args.compare, tuple(args.metric), title=workdir.name)
        for name, why in study.missing:
            print(f"missing: {name}: {why}")
        paths, numbers = write_study(study, workdir)
        summary = {"arms": list(study.results), "missing": [name for name, _ in study.missing]}
        return _finish(workdir, summary, paths, numbers)
    if not args.config:
        raise UserError(
            "--config is missing: an ablation file, e.g. --config=ablations/ffn (or --compare RUN RUN ...)."
        )
    if args.emit not in ("", "slurm", "lines"):
        raise UserError(f"--emit is {args.emit!r}; allowed: slurm, lines.")
    if args.processes < 1 or args.seeds < 0:
        raise UserError(f"--processes is {args.processes} and --seeds {args.seeds}; they must be at least 1.")
    ablation = load_ablation(args.config, overrides, seeds=args.seeds, arms=args.arm)
    cells = cells_of(ablation, workdir)
    arguments = [f"--config.{key}={value}" for key, value in overrides.items()]
    arguments += [f"--seeds={args.seeds}"] * bool(args.seeds) + [f"--arm={arm}" for arm in args.arm]
    if args.cell is not None:
        return _one(cells, args.cell, ablation.measures)
    workdir.mkdir(parents=True, exist_ok=True)
    if args.emit:
        return _emit(args, workdir, cells, arguments)
    failed: dict[int, str] = {}
    if not args.collect:
        _, statuses = collect(ablation, cells, workdir.name)
        todo = [cell for cell, status in zip(cells, statuses, strict=True) if status.state != DONE]
        bad = [(c, s) for c, s in zip(cells, statuses, strict=True) if s.state == MISMATCHED]
        if bad:
            cell, status = bad[0]
            raise UserError(
                f"{cell.path} holds {cell.name} of another ablation ({status.why}): "
                "give another --workdir, or delete it."
            )
        print(f"{len(cells)} cells, {len(cells) - len(todo)} done already")
        try:
            if args.processes > 1 or args.devices:
                devices = [d for d in args.devices.split(",") if d]
                command = cell_command(args.config, args.workdir, arguments)
                failed = run_processes(todo, command, args.processes, devices)
            else:
                failed = run_here(todo, ablation.measures)
        except Stopped as stop:
            print("stopped; run the same command again to continue")
            return int(stop.args[0])
    if args.metric:
        import dataclasses

        ablation = dataclasses.replace(ablation, metrics=tuple(args.metric))
    study, statuses = collect(ablation, cells, workdir.name)
    for what, found in (("missing", study.missing), ("does not match", study.mismatched)):
        for name, why in found:
            print(f"{what}: {name}: {why}")
    paths, numbers = write_study(study, workdir)
    summary = {
        "arms": list(ablation.arms),
        "cells": len(cells),
        "done": sum(status.state == DONE for status in statuses),
        "missing": [name for name, _ in study.missing],
        "mismatched": [name for name, _ in study.mismatched],
        "failed": {cells[index].name: why for index, why in failed.items()},
    }
    _finish(workdir, summary, paths, numbers)
    return 1 if failed else 0


def _one(cells: Sequence[Cell], index: int, measures: Sequence[str]) -> int:
    if not 0 <= index < len(cells):
        raise UserError(f"--cell is {index}; this ablation has cells 0 to {len(cells) - 1}.")
    from gpt_jax.ablation.cells import status_of

    cell = cells[index]
    status = status_of(cell)
    if status.state == MISMATCHED:
        raise UserError(f"{cell.path} holds {cell.name} of another ablation ({status.why}).")
    code = 0 if status.state == DONE else run_cell(cell, measures)
    print(json.dumps({"cell": index, "arm": cell.arm, "seed": cell.seed, "path": str(cell.path), "exit_code": code}))
    return code


def _emit(args: argparse.Namespace, workdir: pathlib.Path, cells: Sequence[Cell], arguments: Sequence[str]) -> int:
    command = shlex.join(cell_command(args.config, args.workdir, arguments, ("gpt-jax",)))
    collecting = f"{command} --collect"
    if args.emit == "slurm":
        path = workdir / "cells.sbatch"
        values = dict(name=workdir.name, last=len(cells) - 1, workdir=shlex.quote(args.workdir))
        atomic_write(path, _SLURM.format(command=command, collect=collecting, **values))
    else:
        path = workdir / "cells.txt"
        atomic_write(path, "".join(f"{command} --cell={cell.index}\n" for cell in cells))
    print(f"{len(cells)} cells; afterwards: {collecting}")
    print(json.dumps({"workdir": str(workdir), "cells": len(cells), "commands": str(path)}))
    return 0


def _finish(
    workdir: pathlib.Path, summary: Mapping[str, Any], paths: Mapping[str, pathlib.Path], numbers: Mapping[str, Any]
) -> int:
    summary = {"workdir": str(workdir), **summary, "report": str(paths["markdown"]), "html": str(paths["html"])}
    atomic_write(workdir / "summary.json", json.dumps({**summary, "results": numbers}, indent=1) + "\n")
    first = next(iter(numbers), None)
    print(json.dumps(summary | ({"metric": first, "results": numbers[first]} if first else {})))
    return 0
