"""Running the cells of an ablation: here, one after the other, or each in a process of its own; what is done is kept.

A finished cell has `cell.json`: its arm and seed, the identity of its config and of its data, the compute of a step
and the final values. A cell that was killed continues from its checkpoint, as any run does.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from gpt_jax.ablation.grid import Before, Cell, identity
from gpt_jax.config import Config, to_dict
from gpt_jax.config_changes import compare
from gpt_jax.data.cache import content_hash, locked
from gpt_jax.errors import UserError
from gpt_jax.files import atomic_write
from gpt_jax.metrics import read_rows
from gpt_jax.options import import_path
from gpt_jax.run import build_run, order_of

FILE = "cell.json"
MISSING, MISMATCHED, DONE = "missing", "mismatched", "done"


@dataclasses.dataclass(frozen=True)
class Status:
    """Whether a cell counts: done, missing or mismatched (`why` says in which keys, or that its data differ)."""

    state: str
    why: str = ""
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def status_of(cell: Cell) -> Status:
    """Reads a cell's record; its data are compared by `check_data`, which sees all cells."""
    try:
        record = json.loads((cell.path / FILE).read_text())
    except FileNotFoundError:
        return Status(MISSING, "not finished" if cell.path.is_dir() else "not begun")
    except ValueError:
        return Status(MISSING, f"{FILE} is damaged")
    if record.get("identity") == cell.identity:
        return Status(DONE, "", record)
    changes = compare(record.get("config", {}), to_dict(cell.config))
    keys = [str(change) for change in (*changes.impossible, *changes.numerics) if change.key != "init.from"]
    return Status(MISMATCHED, "config: " + ("; ".join(keys) or "a run before it is another"), record)


def check_data(cells: Sequence[Cell], statuses: Sequence[Status]) -> list[Status]:
    """Marks done cells whose data are not those of the others with the same data config: another corpus, or Python."""
    groups: dict[str, list[int]] = {}
    for number, (_cell, status) in enumerate(zip(cells, statuses, strict=True)):
        if status.state == DONE:
            key = content_hash([status.record["config"]["data"], status.record["config"]["objective"]])
            groups.setdefault(key, []).append(number)
    out = list(statuses)
    for numbers in groups.values():
        hashes = [statuses[n].record.get("data") for n in numbers]
        usual = collections.Counter(hashes).most_common(1)[0][0]
        for number, found in zip(numbers, hashes, strict=True):
            if found != usual:
                why = f"data: hash {found}, {hashes.count(usual)} other cells of the same data config have {usual}"
                out[number] = dataclasses.replace(statuses[number], state=MISMATCHED, why=why)
    return out


def run_cell(cell: Cell, measures: Sequence[str] = (), log: Callable[[str], None] = print) -> int:
    """Trains a cell (and the run before it), measures it and writes its record.

    Returns:
      0, or 75 if the run was asked to stop.

    Raises:
      UserError: whatever is wrong with its config; the cell's folder holds a run of another config.
    """
    for before in cell.before:
        if code := _run_before(before, log):
            return code
    started = time.monotonic()
    if code := _train(cell.config, cell.path, log):
        return code
    values = final_values(cell.path, cell.config.steps)
    for name in measures:
        values |= import_path(name)(cell)
    record = {
        "arm": cell.arm,
        "seed": cell.seed,
        "identity": cell.identity,
        "data": data_hash(cell.path),
        "code": json.loads((cell.path / "environment.json").read_text()).get("code", {}),
        "flops_per_step": flops_per_step(cell),
        "flops_before": _flops_before(cell),
        "tokens_per_step": cell.config.batch_size * cell.config.context_length,
        "seconds": round(time.monotonic() - started, 1),
        "values": values,
        "config": to_dict(cell.config),
    }
    atomic_write(cell.path / FILE, json.dumps(record, indent=1) + "\n")
    log(f"{cell.name}: done in {record['seconds']:.0f} s")
    return 0


def _run_before(before: Before, log: Callable[[str], None]) -> int:
    before.path.parent.mkdir(parents=True, exist_ok=True)
    with locked(before.path, log):  # cells in other processes may want the same one
        if (before.path / FILE).exists():
            return 0
        log(f"{before.name}, seed {before.config.seed}: the run that comes before")
        if code := _train(before.config, before.path, log):
            return code
        record = {"identity": identity(before.config), "flops_per_step": _flops(before.config)}
        atomic_write(before.path / FILE, json.dumps(record) + "\n")
    return 0


def _train(config: Config, path: pathlib.Path, log: Callable[[str], None]) -> int:
    from gpt_jax.train import train

    code = train(config, str(path), log=lambda line: log(f"  {line}"))["exit_code"]
    jax.clear_caches()  # programs of one cell are of no use to the next, and would pile up
    return code


def run_here(
    cells: Sequence[Cell], measures: Sequence[str], log: Callable[[str], None] = print, stop_on_error: bool = False
) -> dict[int, str]:
    """Runs cells one after the other in this process; returns what went wrong, {index: message}."""
    failed: dict[int, str] = {}
    for number, cell in enumerate(cells):
        log(f"[{number + 1}/{len(cells)}] {cell.name}")
        try:
            code = run_cell(cell, measures, log)
        except UserError as error:
            if stop_on_error:
                raise
            log(f"{cell.name}: {error}")
            failed[cell.index] = str(error)
            continue
        if code:
            raise Stopped(code)
    return failed


class Stopped(Exception):
    """A cell was asked to stop; `args[0]` is the exit code to pass on."""


def run_processes(
    cells: Sequence[Cell],
    command: Sequence[str],
    processes: int,
    devices: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> dict[int, str]:
    """Runs each cell as `command --cell=INDEX`, `processes` at a time; returns what went wrong, {index: message}.

    Args:
      devices: one process at a time gets each of these, as CUDA_VISIBLE_DEVICES and TPU_VISIBLE_CHIPS.
    """
    waiting, running, failed = collections.deque(cells), {}, {}
    free = collections.deque(devices or [""] * processes)
    try:
        while waiting or running:
            while waiting and free:
                cell, device = waiting.popleft(), free.popleft()
                cell.path.mkdir(parents=True, exist_ok=True)
                environment = dict(os.environ)
                if device:
                    environment |= {"CUDA_VISIBLE_DEVICES": device, "TPU_VISIBLE_CHIPS": device}
                with open(cell.path / "log.txt", "ab") as out:
                    arguments = [*command, f"--cell={cell.index}"]
                    child = subprocess.Popen(
                        arguments, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
                    )
                running[child] = (cell, device)
                log(f"{cell.name}: begun, {cell.path / 'log.txt'}")
            for child in [c for c in running if c.poll() is not None]:
                cell, device = running.pop(child)
                free.append(device)
                log(f"{cell.name}: {'done' if child.returncode == 0 else f'ended with {child.returncode}'}")
                if child.returncode:
                    lines = (cell.path / "log.txt").read_text(errors="replace").strip().splitlines()
                    failed[cell.index] = lines[-1] if lines else f"ended with {child.returncode}"
            time.sleep(0.2)
    finally:
        for child in running:
            child.terminate()
        for child in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(60)
    return failed


def cell_command(config: str, workdir: str, arguments: Sequence[str], program: Sequence[str] = ()) -> list[str]:
    """The command that runs one cell, but for its --cell."""
    program = program or (sys.executable, "-m", "gpt_jax.cli")
    return [*program, "ablate", f"--config={config}", f"--workdir={workdir}", *arguments]


def final_values(path: pathlib.Path, step: int) -> dict[str, float]:
    """Everything that a run measured at its last step but perf/*; raises UserError if it has no row of it."""
    rows = [row for row in read_rows(path / "metrics.jsonl") if row["step"] == step]
    if not rows:
        raise UserError(f"{path} has no metrics of step {step}.")
    found = {name: value for name, value in rows[-1].items() if name != "step" and not name.startswith("perf/")}
    evaluation = path / "evaluation.json"
    if evaluation.exists():  # where an error kept validation out of the row, it was made up for later
        found = {f"valid/{name}": value for name, value in json.loads(evaluation.read_text()).items()} | found
    return found


def data_hash(path: pathlib.Path) -> str:
    """A hash of what a run's environment.json says of its data, but for where they lie."""

    def stripped(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: stripped(value) for key, value in node.items() if key not in ("store", "tokens_file")}
        return [stripped(value) for value in node] if isinstance(node, list) else node

    return content_hash(stripped(json.loads((path / "environment.json").read_text()).get("data", {})))


def flops_per_step(cell: Cell) -> float | None:
    """The compute of one update of the cell's arm on a whole batch, kept beside the cells: seeds have the same."""
    key = identity(dataclasses.replace(cell.config, seed=0))
    path = cell.path.parent.parent.parent / "flops" / f"{key}.json"
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(path.read_text())
    value = _flops(cell.config)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(value) + "\n")
    return value


def _flops_before(cell: Cell) -> float:
    """The compute of the whole run that a cell starts from."""
    if not cell.start:
        return 0.0
    before = cell.run_before(cell.start)
    record = json.loads((before.path / FILE).read_text())
    order = order_of(before.config)
    return (record.get("flops_per_step") or 0.0) * order.rows_before(before.config.steps) / order.batch_size


def _flops(config: Config) -> float | None:
    """Counts one update on a whole batch as the compiler sees it before it optimises, without recomputation: loops are
    unrolled."""
    plain = dataclasses.replace(config.model, unroll=0, remat="none")
    plain = dataclasses.replace(config, model=plain, microbatches=1, batch_schedule=())
    cost = build_run(plain, log=lambda line: None).step.lower().cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return float(cost["flops"]) if cost and "flops" in cost else None
