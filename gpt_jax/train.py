"""The training loop. Batches come by step number, so the loop has no state but the train state."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax import distributed, hooks
from gpt_jax.checkpoint import Checkpointer
from gpt_jax.checkpoint_parts import restore_subset
from gpt_jax.config import Config, to_dict
from gpt_jax.config_changes import compare, compare_data, decide
from gpt_jax.console import Console
from gpt_jax.data.baselines import baselines
from gpt_jax.errors import UserError
from gpt_jax.evaluate import evaluate_all, evaluators_of
from gpt_jax.forensics.spikes import Watch
from gpt_jax.metrics import MetricsWriter, open_wandb, read_rows
from gpt_jax.model.size import count_parameters
from gpt_jax.objectives.base import bidirectional_prompt
from gpt_jax.profiling import Startup, Trace
from gpt_jax.remote import is_url
from gpt_jax.report import write_report
from gpt_jax.report_page import describe_memory
from gpt_jax.resume import agreed_latest, check_skip, continued_state
from gpt_jax.run import Run, build_run, following_init, placements, saved_tokenizer
from gpt_jax.sharding import path_name
from gpt_jax.throughput import Clock, model_flops_per_token, total_peak
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
        if not directory.url:
            distributed.check_shared(directory.path)
        distributed.check_devices(config.distributed.devices, config.distributed.device_kind)
        startup.mark("workdir and devices")
        config = following_init(config, log, directory.read_config())
        run = build_run(config, log, saved_tokenizer(directory))
        startup.mark("data and model")
        distributed.check_equal(**{"the data": run.data.fingerprint()})
        changes = settle_changes(run, directory, accept_changes, log)
        checkpointer = stack.enter_context(
            Checkpointer(
                directory.checkpoints_path,
                keep_last=config.checkpoint.keep_last,
                keep_best=config.checkpoint.keep_best,
                keep_every_steps=config.checkpoint.keep_every_steps,
            )
        )
        state, start = first_state(run, checkpointer, changes, log)
        check_skip(changes, run.order, start)
        environment = record_start(run, directory, start, changes)
        startup.mark("restored state" if start else "fresh state")
        writer = MetricsWriter(
            directory.metrics_path,
            tensorboard=directory.tensorboard_path if config.log.tensorboard else None,
            wandb=tracker(run.config, directory),
            resume_step=start,
            writes=directory.writes,
        )
        stack.callback(writer.close)
        console = stack.enter_context(Console(config.steps, start, quiet=not directory.writes))
        clock = Clock(flops_per_token(run.config), total_peak(list(run.step.mesh.devices.flat)))
        report_row = hooks.Log(
            writer,
            console,
            clock,
            config.steps,
            config.log.every_steps,
            config.log.console_every_steps,
            config.optimizer.max_skipped,
        )
        evaluators = evaluators_of(run)
        validate = hooks.Validate(
            writer,
            console,
            lambda params, at: evaluate_all(
                run,
                params,
                max_batches=config.eval.max_batches if at < config.steps else 0,
                evaluators=evaluators,
                step=at,
                limit=config.eval.max_generated if at < config.steps else 0,
            ),
        )
        save = hooks.Save(
            checkpointer,
            writer,
            directory.checkpoint_metadata(to_dict(run.config)),
            config.checkpoint.every_steps,
            config.checkpoint.every_minutes,
            copier(config.log.copy_to, directory, log),
        )
        sample = hooks.Sample(directory, console, sampler(run))
        watch = Watch(directory, run.data.train, run.step, config.seed, writer, config.log.spike_z)
        trace = Trace(directory.path / "profile", profile)
        stack.callback(trace.close)

        step, done, pending, values = run.step, start, None, {}
        startup.mark("evaluators and hooks")
        with run.loader(lambda: state.all_params, start, console.show) as loader:
            if start < config.steps:
                step.compiled  # noqa: B018  (made here, so that its time is known)
                startup.mark("compiling the step")
                log(str(startup))
                seconds = {name: round(value, 2) for name, value in startup.seconds.items()}
                directory.write_json("environment.json", environment | {"start_seconds": seconds})
            stop = stack.enter_context(Preemption())
            for index, batch in loader:
                trace.before(index + 1, state)
                state, metrics = step(state, batch)
                trace.after(index + 1, metrics)
                if pending is not None:
                    report_row(*pending)
                    watch(*pending[:2], state)
                done, tokens = index + 1, run.order.rows_of_step(index) * config.context_length
                pending = (done, metrics, tokens, loader.stall_seconds, dict(loader.perf))
                last, settled = done == config.steps, done % run.segment == 0
                stopping = settled and stop.agreed(done // run.segment)
                evaluating = last or hooks.due(done, config.eval.every_steps)
                sampling = run.objective.generates and (last or hooks.due(done, config.sample.every_steps))
                saving = last or stopping or (settled and save.is_due(done))
                if evaluating or sampling or saving:
                    report_row(*pending)
                    watch(*pending[:2], state)
                    pending = None
                    with clock.pause():
                        with saved_if_it_fails(functools.partial(save, done, state) if settled else None, log):
                            if evaluating:
                                values = validate(done, state.eval_params(config.eval.weights))
                            if sampling:
                                sample(done, state.eval_params(config.eval.weights))
                        if saving:
                            save(done, state)
                if stopping and not last:
                    break
            if pending is not None:
                report_row(*pending)
        if start == done == config.steps:  # nothing was left to train
            values = last_validation(directory, done)
            if distributed.decide(not values):  # an error took it from the run
                with clock.pause():
                    values = validate.evaluate(state.eval_params(config.eval.weights), done)
        checkpointer.wait()
        writer.flush()
        summary = finish(run, directory, done, values, start, stop.requested, time.monotonic() - started, log)
        save.copy_logs()
        distributed.gather("done")
        return summary


@contextlib.contextmanager
def saved_if_it_fails(save: Callable[[], None] | None, log: Callable[[str], None]) -> Iterator[None]:
    """Saves before an error of validation or sampling ends the run: no step of training is lost to it."""
    try:
        yield
    except Exception:
        if save and not distributed.several():  # the others have not failed, and would have to save with this one
            try:
                save()
                log("saved before the error that follows; the same command goes on from here")
            except UserError as another:
                log(f"not saved before the error that follows: {another}")
        raise


def last_validation(directory: Workdir, step: int) -> dict[str, float]:
    """What the row of a step says of validation, or {}."""
    rows = read_rows(directory.metrics_path) if directory.metrics_path.exists() else []
    row = rows[-1] if rows and rows[-1]["step"] == step else {}
    return {name: value for name, value in row.items() if name.startswith(("valid/", "tasks/"))}


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
            hooks.strip(abstract),
            lambda: hooks.strip(run.step.init(run.config.seed)),
            changed,
            log,
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


def flops_per_token(config: Config) -> float:
    model = config.model
    return model_flops_per_token(count_parameters(model), model.num_layers, model.d_model, config.context_length)


def tracker(config: Config, directory: Workdir) -> Any:
    """The Weights & Biases run of this directory, if the config names a project."""
    if not config.log.wandb or not directory.writes:
        return None
    return open_wandb(config.log.wandb, directory.path, config.name, to_dict(config))


def copier(url: str, directory: Workdir, log: Callable[[str], None]) -> Callable[[], None]:
    """Returns what sends a gs:// run's files there and copies logs to `url`; a store that fails ends no run."""
    refuse = "" if not url or is_url(url) else url
    if refuse:
        raise UserError(f"log.copy_to is {refuse!r}; it is a URL, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.")

    def copy() -> None:
        publish_or_say(directory, log)
        try:
            directory.copy_to(url)
        except UserError as error:
            log(f"log.copy_to: {error}")

    return copy


def publish_or_say(directory: Workdir, log: Callable[[str], None]) -> None:
    """Sends a gs:// run's files there; a store that fails for a while does not end the run, the next time sends all."""
    try:
        directory.publish()
    except UserError as error:
        log(str(error))


def sampler(run: Run) -> Callable[[Any], list[tuple[str, str]]]:
    """Returns params -> [(prompt, continuation)] for the config's prompts."""
    from gpt_jax.generation import generate_text

    settings, model = run.config.sample, getattr(run.objective, "model", None)

    def sample(params: Any) -> list[tuple[str, str]]:
        if model is None or not settings.prompts:
            return []
        texts = generate_text(
            model,
            params["model"],
            run.data.tokenizer,
            list(settings.prompts),
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=run.config.seed,
            bidirectional_prompt=bidirectional_prompt(run.config.objective),
        )
        return list(zip(settings.prompts, texts, strict=True))

    return sample


def finish(
    run: Run,
    directory: Workdir,
    done: int,
    values: dict[str, float],
    start: int,
    stopped: bool,
    seconds: float,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Ends a run: its history, its report, and the summary that scripts read."""
    finished = done >= run.config.steps
    directory.add_history("finish" if finished else "preempted", done)
    summary: dict[str, Any] = {"workdir": directory.name, "step": done, "steps": run.config.steps}
    if finished and directory.writes:
        known = directory.read_json("baselines.json")
        if known is None and run.data.valid and start < done and any(k.endswith("bits_per_byte") for k in values):
            known = baselines(run.data)
            directory.write_json("baselines.json", known)
        if values:
            directory.write_json("evaluation.json", {k.removeprefix("valid/"): v for k, v in values.items()})
        directory.write_json("memory.json", describe_memory(run.step))
        report = write_report(directory.path, evaluation=directory.read_json("evaluation.json"), baselines=known)
        shown = f"{directory.url}/{report.name}" if directory.url else str(report)
        summary |= {**values, **(known or {}), "report": shown}
        log(f"finished {done} steps in {seconds:.0f} s; report: {shown}")
    elif not finished:
        log(f"stopped at step {done}, saved; run the same command again to continue")
    return summary | {"seconds": round(seconds, 1), "exit_code": 0 if finished or not stopped else EXIT_PREEMPTED}


__all__ = ["UserError", "placements", "train"]
