"""What happens between steps: logging, validation, checkpoints, samples. Hooks import nothing of the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax import distributed
from gpt_jax.checkpoint import Checkpointer
from gpt_jax.config import Config, to_dict
from gpt_jax.console import Console, console_line
from gpt_jax.errors import UserError
from gpt_jax.evaluate import evaluate_all, evaluators_of
from gpt_jax.flops import step_flops_per_token
from gpt_jax.forensics.spikes import Watch
from gpt_jax.metrics import MetricsWriter, open_wandb
from gpt_jax.objectives.base import bidirectional_prompt
from gpt_jax.profiling import Trace
from gpt_jax.remote import is_url
from gpt_jax.run import Run
from gpt_jax.throughput import Clock, total_peak
from gpt_jax.workdir import Workdir

_ASK_EVERY = 4  # steps between two questions to process 0


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@dataclasses.dataclass
class Log:
    """Writes the row of a step and, every so often, its line on the console."""

    writer: MetricsWriter
    console: Console
    clock: Clock
    steps: int
    every: int
    console_every: int
    max_skipped: int

    def __call__(
        self, step: int, metrics: Mapping[str, Any], tokens: int, stall: float, more: Mapping[str, float] | None = None
    ) -> None:
        """Logs step `step`; `metrics` are fetched here, after the next step has been dispatched; `more` is 'perf/*'."""
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        perf = self.clock.tick(step, tokens, stall) | dict(more or {})
        skipped_in_a_row = values.pop("skipped_in_a_row", 0.0)
        if due(step, self.every) or step == self.steps:
            self.writer.add(step, {f"train/{name}": value for name, value in values.items()} | perf)
        if due(step, self.console_every) or step in (1, self.steps):
            self.console.show(self._line(step, values, perf))
        self.console.progress(step)
        if skipped_in_a_row > self.max_skipped:
            raise UserError(
                f"{int(skipped_in_a_row)} updates in a row were not finite (up to step {step}; optimizer.max_skipped "
                f"is {self.max_skipped}): the run stops; the last good checkpoint is kept."
            )

    def _line(self, step: int, values: Mapping[str, float], perf: Mapping[str, float]) -> str:
        milliseconds = perf.get("perf/step_ms")
        return console_line(
            step,
            self.steps,
            loss=values["loss"],
            loss_z=self.writer.zscore("train/loss"),
            gnorm=values["grad_norm"],
            gnorm_z=self.writer.zscore("train/grad_norm"),
            lr=values["lr"],
            ms=milliseconds,
            tokens_per_s=perf.get("perf/tokens_per_s"),
            mfu=perf.get("perf/mfu"),
            eta=self.clock.eta(self.steps),
        )


@dataclasses.dataclass
class Validate:
    """Evaluates on schedule and enters the result in the step's row."""

    writer: MetricsWriter
    console: Console
    evaluate: Callable[[Any, int], dict[str, float]]  # (params, step) -> values

    def __call__(self, step: int, params: Any) -> dict[str, float]:
        started = time.perf_counter()
        values = self.evaluate(params, step)
        if values:
            self.writer.add(step, values)
            shown = [f"valid {values['valid/loss']:.4f}"] if "valid/loss" in values else []
            shown += [f"bits/byte {values['valid/bits_per_byte']:.4f}"] if "valid/bits_per_byte" in values else []
            shown += [f"{name} {value:.4f}" for name, value in _parts(values)]
            self.console.show(f"step {step:05d} | {' | '.join(shown)} | {time.perf_counter() - started:.1f} s")
        return values


def _parts(values: Mapping[str, float]) -> list[tuple[str, float]]:
    """What a validation's line shows beside the loss: the losses of its sources, and what tasks are scored by."""
    out = []
    for key, value in values.items():
        name = key.removeprefix("valid/")
        inner = name.rpartition("/")[2]
        plain = inner in ("nll", "perplexity", "tokens", "bits_per_byte") or inner.endswith("_nll")
        if inner == "loss" and name != "loss":
            out.append((name.removesuffix("/loss"), value))
        elif inner != "loss" and not plain and "loss/" not in name:
            out.append((name, value))
    return out[:8]


@dataclasses.dataclass
class Save:
    """Saves the state when it is due, after the rows up to its step are on disk; never parameters that are not finite.

    A finite gradient may still give an update that is not (an epsilon of 0), which the step does not look for.
    """

    checkpointer: Checkpointer
    writer: MetricsWriter
    metadata: Mapping[str, Any]
    every_steps: int
    every_minutes: float
    log: Callable[[str], None]
    copy_logs: Callable[[], None] = lambda: None
    last: float = dataclasses.field(default_factory=time.monotonic)

    def is_due(self, step: int) -> bool:
        self.checkpointer.check()
        minutes = bool(self.every_minutes) and time.monotonic() - self.last >= 60 * self.every_minutes
        if self.every_minutes and distributed.several():  # clocks differ, so process 0 says for all, now and then
            minutes = step % _ASK_EVERY == 0 and distributed.decide(minutes)
        return due(step, self.every_steps) or minutes

    def __call__(self, step: int, state: Any) -> None:
        self.writer.flush()
        self.copy_logs()
        self.last = time.monotonic()
        if not all_finite(state.params):
            self.log(f"step {step}: parameters are not finite, not saved: the checkpoints before are kept")
            return
        self.checkpointer.save(
            step, strip(state), metadata=self.metadata, valid_losses=self.writer.column("valid/loss")
        )


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether no leaf holds an infinity or something that is no number."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


@dataclasses.dataclass
class Sample:
    """Continues fixed prompts, so that one can read a run."""

    workdir: Workdir
    console: Console
    generate: Callable[[Any], list[tuple[str, str]]]  # params -> (prompt, continuation) pairs

    def __call__(self, step: int, params: Any) -> None:
        pairs = self.generate(params)
        text = "\n\n".join(f"{prompt}{continuation}" for prompt, continuation in pairs)
        self.workdir.write_sample(step, text + "\n")
        for prompt, continuation in pairs:
            shown = (prompt + continuation).replace("\n", "\\n")
            self.console.show(f"step {step:05d} | sample | {shown[:160]}")


def strip(state: Any) -> Any:
    """The state without its frozen parameters, which are stored once per run."""
    return dataclasses.replace(state, frozen={})


@dataclasses.dataclass(frozen=True)
class Hooks:
    """All that a run does between steps, and what that writes to and measures with."""

    writer: MetricsWriter
    console: Console
    clock: Clock
    log: Log
    watch: Watch
    validate: Validate
    sample: Sample
    save: Save
    trace: Trace


@contextlib.contextmanager
def open_hooks(
    run: Run,
    directory: Workdir,
    checkpointer: Checkpointer,
    start: int,
    profile: range,
    log: Callable[[str], None],
) -> Iterator[Hooks]:
    """Opens what a run writes to, and builds its hooks; closes it all in the end."""
    config, evaluators = run.config, evaluators_of(run)

    def evaluate(params: Any, step: int) -> dict[str, float]:
        last = step >= config.steps  # then on all there is
        return evaluate_all(
            run,
            params,
            max_batches=0 if last else config.eval.max_batches,
            evaluators=evaluators,
            step=step,
            limit=0 if last else config.eval.max_generated,
        )

    with contextlib.ExitStack() as stack:
        writer = MetricsWriter(
            directory.metrics_path,
            tensorboard=directory.tensorboard_path if config.log.tensorboard else None,
            wandb=tracker(config, directory),
            resume_step=start,
            writes=directory.writes,
        )
        stack.callback(writer.close)
        console = stack.enter_context(Console(config.steps, start, quiet=not directory.writes))
        trace = stack.enter_context(contextlib.closing(Trace(directory.path / "profile", profile)))
        clock = Clock(
            step_flops_per_token(run.step.abstract, config.model, config.context_length),
            total_peak(list(run.step.mesh.devices.flat)),
        )
        yield Hooks(
            writer=writer,
            console=console,
            clock=clock,
            log=Log(
                writer,
                console,
                clock,
                config.steps,
                config.log.every_steps,
                config.log.console_every_steps,
                config.optimizer.max_skipped,
            ),
            watch=Watch(directory, run.data.train, run.step, config.seed, writer, config.log.spike_z),
            validate=Validate(writer, console, evaluate),
            sample=Sample(directory, console, sampler(run)),
            save=Save(
                checkpointer,
                writer,
                directory.checkpoint_metadata(to_dict(config)),
                config.checkpoint.every_steps,
                config.checkpoint.every_minutes,
                log,
                copier(config.log.copy_to, directory, log),
            ),
            trace=trace,
        )


def tracker(config: Config, directory: Workdir) -> Any:
    """The Weights & Biases run of this directory, if the config names a project."""
    if not config.log.wandb or not directory.writes:
        return None
    return open_wandb(config.log.wandb, directory.path, config.name, to_dict(config))


def copier(url: str, directory: Workdir, log: Callable[[str], None]) -> Callable[[], None]:
    """Returns what sends a gs:// run's files there and copies logs to `url`; a store that fails ends no run."""
    if url and not is_url(url):
        raise UserError(f"log.copy_to is {url!r}; it is a URL, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.")

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
