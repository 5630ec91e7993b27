"""The command `gpt-jax replay`: reproduces one step of a run and, where it went wrong, names what did first."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.checkpoint import find_checkpoint, list_steps, restore, restore_frozen
from gpt_jax.errors import UserError
from gpt_jax.files import atomic_write
from gpt_jax.forensics.rerun import check_unbroken, differences, read_recorded, run_at
from gpt_jax.forensics.spikes import batch_ids, build_examine, jsonable
from gpt_jax.forensics.trace import trace_update
from gpt_jax.inherit import saved_config
from gpt_jax.remote import refuse_url
from gpt_jax.run import Run, build_run
from gpt_jax.train import initial_state


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("workdir", help="the run; only its folder `replay` is written to")
    parser.add_argument("--step", type=int, required=True, help="the step, as metrics.jsonl counts: from 1")
    parser.add_argument(
        "--trace", action="store_true", help="look for numbers that are not finite even if all seem to be"
    )


def main(args: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs the command."""
    if overrides:
        raise UserError(f"replay takes no --config.{next(iter(overrides))}: it repeats what the run did.")
    refuse_url(args.workdir, "the run to replay", "copy the run's folder to a disk")
    result = replay(args.workdir, args.step, always_trace=args.trace)
    path = pathlib.Path(args.workdir) / "replay" / f"step_{args.step:08d}.json"
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, json.dumps(jsonable(result), indent=1) + "\n")
    start = f"from the checkpoint of step {result['from']}" if result["from"] else "from the start"
    same = {True: "the same numbers as the run", False: "other numbers than the run", None: "no row to compare with"}
    print(f"step {args.step} again, {start}: loss {result['metrics']['loss']:.6g}; {same[result['same']]}")
    for name, losses in result["rows"].items():
        order = np.argsort(-np.nan_to_num(np.asarray(losses, np.float64), nan=np.inf))[:4]
        print(f"highest losses of rows ({name}): " + ", ".join(f"row {i}: {losses[i]:.4g}" for i in order))
    if result["culprit"]:
        print(result["culprit"]["sentence"])
    elif not result["finite"]:
        print("not finite, but no operation could be named")
    short = {key: result[key] for key in ("step", "from", "same", "finite", "culprit")}
    print(json.dumps(jsonable({"workdir": args.workdir, **short, "file": str(path)})))
    return 0


def replay(workdir: str, step: int, *, always_trace: bool = False) -> dict[str, Any]:
    """Reproduces step `step` (counted from 1) from the newest checkpoint before it, or from the start.

    Returns:
      {"step", "from": step of the checkpoint, 0 is the start; "metrics"; "same": whether they are those recorded, None
      without a row; "finite": whether all of the new state, the loss and the gradient are; "ids", "rows",
      "gradient_norms", "weight_norms": see spikes.py; "culprit": see trace.py, or None}.

    Raises:
      UserError: no run there, no such step, no checkpoint that can be read, or the run went on with other settings
        between the checkpoint and the step.
    """
    recorded, changes = read_recorded(workdir)
    if not 1 <= step <= (steps := saved_config(workdir)["steps"]):
        raise UserError(f"--step is {step}; the run has steps 1 to {steps}.")
    check_unbroken(changes, checkpoint_before(workdir, step)[1], step, f"{workdir!r}, --step={step}")
    run = run_at(workdir, step, changes)
    state, start = state_before(run, workdir, step)
    with run.loader(lambda: state.all_params, start, lambda line: None, stop=step) as loader:
        for index, batch in loader:
            if index == step - 1:
                break
            state, _ = run.step(state, batch)
    before = jax.tree.map(jnp.copy, state)  # the step donates its state
    after, metrics = run.step(state, batch)
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    row = recorded.get(step, {})
    shown = build_examine(run.step, run.config.seed)(before.all_params, batch, step - 1)
    finite = all(np.isfinite([values["loss"], values["grad_norm"]])) and _finite(after)
    culprit = None
    if always_trace or not finite:
        culprit = name_culprit(run, before, batch)
    return {
        "step": step,
        "from": start,
        "metrics": values,
        "same": None if not row else not differences(row, metrics),
        "finite": bool(finite),
        "ids": batch_ids(run.data.train, step - 1),
        **{key: shown[key] for key in ("rows", "gradient_norms", "weight_norms")},
        "culprit": None if culprit is None else {**dataclasses.asdict(culprit), "sentence": culprit.sentence()},
    }


def state_before(run: Run, workdir: str, step: int) -> tuple[Any, int]:
    """The state of the newest checkpoint before a step, or the initial one; and its step."""
    folder, start = checkpoint_before(workdir, step)
    if not start:
        return initial_state(run, lambda line: None), 0
    abstract = run.step.abstract_state
    state = restore(folder, start, dataclasses.replace(abstract, frozen={}))
    return dataclasses.replace(state, frozen=restore_frozen(folder, abstract.frozen)), start


def checkpoint_before(workdir: str, step: int) -> tuple[pathlib.Path | None, int]:
    """(folder of checkpoints, step of the newest before a step); the step is 0 if there is none."""
    try:
        folder, _ = find_checkpoint(workdir)
    except UserError:
        return None, 0
    return folder, max((found for found in list_steps(folder) if found < step), default=0)


def name_culprit(run: Run, state: Any, batch: Any) -> Any:
    """Walks through the step with one micro-batch: the same sums, in an order in which rows keep their places."""
    config = run.config
    if config.microbatches > 1:
        single = build_run(dataclasses.replace(config, microbatches=1), lambda line: None, run.data.tokenizer)
        run = dataclasses.replace(run, step=single.step)
    rows = run.objective.num_rows(batch)
    period = len(config.model.pattern)
    return trace_update(run.step, state, batch, rows=rows, tokens=config.context_length, period=period)


def _finite(tree: Any) -> bool:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return bool(jax.jit(lambda xs: jnp.all(jnp.array([jnp.isfinite(x).all() for x in xs])))(leaves))
