"""The training loop. Batches come by step number, so the loop has no state but the train state."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax import distributed
from gpt_jax.checkpoint import Checkpointer
from gpt_jax.checkpoint_parts import restore_subset
from gpt_jax.config import Config, to_dict
from gpt_jax.config_changes import compare, compare_data, decide
from gpt_jax.data.baselines import baselines
from gpt_jax.errors import UserError
from gpt_jax.evaluate import check_tasks
from gpt_jax.hooks import Hooks, due, open_hooks, publish_or_say, strip
from gpt_jax.inherit import following_init, saved_tokenizer
from gpt_jax.metrics import read_rows
from gpt_jax.profiling import Startup, check_steps
from gpt_jax.report import write_report
from gpt_jax.report_page import describe_memory
from gpt_jax.resume import agreed_latest, check_skip, continued_state
from gpt_jax.run import Run, build_run
from gpt_jax.sharding import path_name
from gpt_jax.train_state import TrainState, join
from gpt_jax.workdir import EXIT_PREEMPTED, Preemption, Workdir, open_workdir, stopped_by_sigterm


def train(
    config: Config,
    workdir: str,
    *,
    accept_changes: bool = False,
    profile: range = range(0),
    startup: Startup | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains to `config.steps`, continuing the run that `workdir` holds, if any.

    Args:
      config: resolved. workdir: the run's directory. accept_changes: continue although numerics or data changed.
      profile: steps to trace, counted from 1, into `workdir`/profile. startup: what passed before.
      log: where lines for people go.

    Returns:
      What the command prints last: steps, losses, seconds, and `exit_code` (0, or 75 when asked to stop).

    Raises:
      UserError: a mistake in config or data, a run in use, a damaged checkpoint.
      Unavailable: asked to stop before the first step.
    """
    started, startup = time.monotonic(), startup or Startup()
    with stopped_by_sigterm(), open_workdir(workdir) as directory, contextlib.ExitStack() as stack:
        stack.callback(publish_or_say, directory, log)  # however it ends: of one that failed they say why
        log = distributed.said_once(log)
        run = open_run(config, directory, startup, log)
        changes = settle_changes(run, directory, accept_changes, log)
        checkpointer = stack.enter_context(open_checkpointer(run.config, directory))
        at = Progress(*first_state(run, checkpointer, changes, log))
        check_skip(changes, run.order, at.start)
        check_steps(profile, at.start, run.config.steps)
        environment = record_start(run, directory, at.start, changes)
        startup.mark("restored state" if at.start else "fresh state")
        hooks = stack.enter_context(open_hooks(run, directory, checkpointer, at.start, profile, log))
        startup.mark("evaluators and hooks")
        with run.loader(at.params, at.start, hooks.console.show) as loader:
            if at.start < run.config.steps:
                compile_step(run, directory, environment, startup, log)
            stop = stack.enter_context(Preemption())
            take_steps(run, loader, hooks, at, stop, log)
        return finish(run, directory, hooks, at, started, log)


def take_steps(run: Run, loader: Any, hooks: Hooks, at: Progress, stop: Preemption, log: Callable[[str], None]) -> None:
    """The loop: to the run's end, or to where it is asked to stop, saved."""
    config = run.config
    for index, batch in loader:
        hooks.trace.before(index + 1, at.state)
        at.state, metrics = run.step(at.state, batch)
        hooks.trace.after(index + 1, metrics)
        at.report(hooks)  # the step before, now that this one is on its way
        at.done = done = index + 1
        tokens = run.order.rows_of_step(index) * config.context_length
        at.pending = Pending(done, metrics, tokens, loader.stall_seconds, dict(loader.perf))

        last, settled = done == config.steps, done % run.segment == 0
        stopping = settled and stop.agreed(done // run.segment)
        evaluating = last or due(done, config.eval.every_steps)
        sampling = run.objective.generates and (last or due(done, config.sample.every_steps))
        saving = last or stopping or (settled and hooks.save.is_due(done))
        if evaluating or sampling or saving:
            at.report(hooks)
            with hooks.clock.pause():
                with saved_if_it_fails(hooks.save if settled else None, at, log):
                    if evaluating:
                        at.values = hooks.validate(done, at.state.eval_params(config.eval.weights))
                    if sampling:
                        hooks.sample(done, at.state.eval_params(config.eval.weights))
                if saving:
                    hooks.save(done, at.state)
        if stopping:
            break


@dataclasses.dataclass(frozen=True)
class Pending:
    """What is reported of a step that is on its way: to read its metrics is to wait for it."""

    step: int
    metrics: Mapping[str, Any]
    tokens: int
    stall: float
    perf: Mapping[str, float]


@dataclasses.dataclass
class Progress:
    """How far a run is. The loop moves it on; a loader whose batches are made by the parameters reads it.

    Attributes:
      state: the newest. start: steps done before. done: steps done. pending: a step that is not reported yet.
      values: of the last validation.
    """

    state: TrainState
    start: int
    done: int = dataclasses.field(init=False)
    pending: Pending | None = None
    values: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.done = self.start

    def params(self) -> Any:
        return self.state.all_params

    def report(self, hooks: Hooks) -> None:
        """Reports the pending step, if there is one: its row, its line, and a look at it if it is odd."""
        if self.pending is not None:
            was, self.pending = self.pending, None
            hooks.log(was.step, was.metrics, was.tokens, was.stall, was.perf)
            hooks.watch(was.step, was.metrics, self.state)


def open_run(config: Config, directory: Workdir, startup: Startup, log: Callable[[str], None]) -> Run:
    """Builds the run of a directory, once its devices and processes are known to be those expected."""
    if not directory.url:
        distributed.check_shared(directory.path)
    distributed.check_devices(config.distributed.devices, config.distributed.device_kind)
    startup.mark("workdir and devices")
    config = following_init(config, log, directory.read_config())
    run = build_run(config, log, saved_tokenizer(directory))
    if run.config.eval.tasks:
        check_tasks(run)
    startup.mark("data and model")
    distributed.check_equal(**{"the data": run.data.fingerprint()})
    return run


def open_checkpointer(config: Config, directory: Workdir) -> Checkpointer:
    return Checkpointer(
        directory.checkpoints_path,
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
        keep_every_steps=config.checkpoint.keep_every_steps,
    )


def compile_step(
    run: Run, directory: Workdir, environment: dict[str, Any], startup: Startup, log: Callable[[str], None]
) -> None:
    """Compiles the step ahead of the first batch, so that its time is known, and says where the start's time went."""
    run.step.compiled  # noqa: B018  (a property that is made once)
    startup.mark("compiling the step")
    log(str(startup))
    seconds = {name: round(value, 2) for name, value in startup.seconds.items()}
    directory.write_json("environment.json", environment | {"start_seconds": seconds})


@contextlib.contextmanager
def saved_if_it_fails(
    save: Callable[[int, TrainState], None] | None, at: Progress, log: Callable[[str], None]
) -> Iterator[None]:
    """Saves before an error of validation or sampling ends the run: no step of training is lost to it."""
    try:
        yield
    except Exception:
        if save and not distributed.several():  # the others have not failed, and would have to save with this one
            try:
                save(at.done, at.state)
                log("saved before the error that follows; the same command goes on from here")
            except UserError as another:
                log(f"not saved before the error that follows: {another}")
        raise


def settle_changes(run: Run, directory: Workdir, accept: bool, log: Callable[[str], None]) -> dict[str, Any]:
    """Compares a continued run's config and data with those it had so far; returns the changes to record."""
    old, new = directory.read_config(), to_dict(run.config)
    if old is None:
        return {}
    found = compare(old, new)
    data = (directory.read_json("environment.json") or {}).get("data")
    changed = compare_data(data, json.loads(json.dumps(run.data.info))) if data else None
    if changed:
        found = dataclasses.replace(found, numerics=(*found.numerics, changed))
    for line in decide(found, accept, directory.name):
        log(line)
    return found.as_history()


def first_state(
    run: Run, checkpointer: Checkpointer, changed: Iterable[str], log: Callable[[str], None]
) -> tuple[TrainState, int]:
    """Restores the newest checkpoint of the run, or makes a fresh state, perhaps from another run's weights."""
    latest = agreed_latest(checkpointer)
    abstract = run.step.abstract_state
    if latest is not None:
        state = continued_state(
            checkpointer,
            latest,
            strip(abstract),
            lambda: strip(run.step.init(run.config.seed)),
            changed,
            log,
            to_dict(run.config),
        )
        frozen = checkpointer.restore_frozen(abstract.frozen) if jax.tree.leaves(abstract.frozen) else abstract.frozen
        log(f"continuing at step {latest} of {run.config.steps}")
        return dataclasses.replace(state, frozen=frozen), latest
    state = initial_state(run, log)
    checkpointer.discard_frozen()
    if jax.tree.leaves(state.frozen):
        checkpointer.save_frozen(state.frozen)
    return state, 0


def initial_state(run: Run, log: Callable[[str], None]) -> TrainState:
    """What a run starts from: parameters of its seed, or another run's weights by name.

    Raises:
      UserError: the objective reads a frozen model (a reference, a teacher), and no run gives its weights.
    """
    state = run.step.init(run.config.seed)
    init, given = run.config.init, ()
    if init.source:
        params, restored = restore_subset(init.source, join(state.params, state.frozen), rename=init.rename)
        log(restored.describe())
        given = restored.restored
        for root, other in run.objective.copies.items():
            log(f"{root}: a copy of {other}")
            params = {**params, root: jax.tree.map(jnp.copy, params[other])}
        state = run.step.with_params(state, params)
    missing = _not_given(run.objective, state.frozen, given)
    if missing:
        root = missing.split("/")[0]
        raise UserError(
            f"the objective reads a frozen model, {root!r}, and no run gives {missing!r}: --config.init.from=RUN "
            f"\"--config.init.rename=(('^model/', '{root}/'),)\", of the same shape."
        )
    return state


def _not_given(objective: Any, frozen: Any, given: Iterable[str]) -> str:
    """The first parameter of a frozen root beside the trained model that no copy and no other run gives; or ''."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(frozen)]
    own = [name for name in names if any(re.fullmatch(pattern, name) for pattern in objective.frozen)]
    known, exempt = set(given), {"model", *objective.copies}
    return next((name for name in own if name.split("/")[0] not in exempt and name not in known), "")


def record_start(run: Run, directory: Workdir, start: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Writes what is known of a run before its first step; returns what environment.json holds."""
    if changes:
        directory.add_history("change", start, changes=changes)
    environment = directory.write_environment(run.data.info)  # after the change is in the history: a kill between
    directory.write_config(to_dict(run.config))  # loses neither
    directory.add_history("resume" if start else "start", start)
    with tempfile.TemporaryDirectory() as folder:
        run.data.tokenizer.save(folder)
        directory.save_tokenizer(folder)
    directory.publish()
    return environment


def finish(
    run: Run, directory: Workdir, hooks: Hooks, at: Progress, started: float, log: Callable[[str], None]
) -> dict[str, Any]:
    """Ends a run: its history, its report, and the summary that scripts read."""
    if at.start == at.done == run.config.steps:  # nothing was left to train
        at.values = last_validation(directory, at.done)
        if distributed.decide(not at.values):  # an error took it from the run
            at.values = hooks.validate.evaluate(at.state.eval_params(run.config.eval.weights), at.done)
    hooks.save.checkpointer.wait()
    hooks.writer.flush()
    finished, seconds = at.done >= run.config.steps, time.monotonic() - started
    directory.add_history("finish" if finished else "preempted", at.done)
    summary: dict[str, Any] = {"workdir": directory.name, "step": at.done, "steps": run.config.steps}
    if finished and directory.writes:
        summary |= write_results(run, directory, at)
        log(f"finished {at.done} steps in {seconds:.0f} s; report: {summary['report']}")
    elif not finished:
        log(f"stopped at step {at.done}, saved; run the same command again to continue")
    hooks.save.copy_logs()
    distributed.gather("done")
    return summary | {"seconds": round(seconds, 1), "exit_code": 0 if finished else EXIT_PREEMPTED}


def last_validation(directory: Workdir, step: int) -> dict[str, float]:
    """What the row of a step says of validation, or {}."""
    rows = read_rows(directory.metrics_path) if directory.metrics_path.exists() else []
    row = rows[-1] if rows and rows[-1]["step"] == step else {}
    return {name: value for name, value in row.items() if name.startswith(("valid/", "tasks/"))}


def write_results(run: Run, directory: Workdir, at: Progress) -> dict[str, Any]:
    """Writes what a finished run came to, and its report; returns the numbers and where the report is."""
    known = directory.read_json("baselines.json")
    trained = at.start < at.done and any(name.endswith("bits_per_byte") for name in at.values)
    if known is None and run.data.valid and trained:
        known = baselines(run.data)
        directory.write_json("baselines.json", known)
    if at.values:
        directory.write_json("evaluation.json", {k.removeprefix("valid/"): v for k, v in at.values.items()})
    directory.write_json("memory.json", describe_memory(run.step))
    report = write_report(directory.path, evaluation=directory.read_json("evaluation.json"), baselines=known)
    shown = f"{directory.url}/{report.name}" if directory.url else str(report)
    return {**at.values, **(known or {}), "report": shown}
