"""From a resolved config to the parts of a run: data, objective, optimizer, train step.

Every command (train, eval, plan) builds a run here, so that none has a special path.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax

from gpt_jax.checkpoint import find_checkpoint, restore, restore_frozen
from gpt_jax.config import Config
from gpt_jax.data import Data, Loader, Tokenizer, prepare_data
from gpt_jax.data.batches import BatchOrder, resolve_batch_schedule
from gpt_jax.data.ramp import RampedSource, check_schedule, rows_at, rows_before
from gpt_jax.errors import UserError, choose
from gpt_jax.eval_step import build_eval_step, build_predict_step
from gpt_jax.inherit import following_init, saved_run
from gpt_jax.model.lora import LORA_BASE
from gpt_jax.objectives.base import Host, Objective, Setting, build_objective, check_spec, rows_of
from gpt_jax.optim import check_groups, make_optimizer, make_schedule
from gpt_jax.sharding import AXES, DEFAULT_RULES, batch_shardings, check_rules, make_mesh, path_name
from gpt_jax.step import TrainStep, build_train_step


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run.

    Attributes:
      config: with vocab_size and max_positions filled in. data, objective, step: see their modules.
      order: rows of the batch of a step. tokens_at: tokens in the batches of all steps before a step.
    """

    config: Config
    data: Data
    objective: Objective
    step: TrainStep
    order: BatchOrder
    tokens_at: Callable[[Any], Any]

    def part(self, source: Any) -> Objective:
        """The objective that a validation source is for."""
        return self.objective.parts()[source.part][0]

    def evaluator(self, source: Any) -> Callable[[Any, Any, int], dict[str, Any]]:
        return build_eval_step(self.step, source.spec(), seed=self.config.seed, objective=self.part(source))

    def predictor(self, source: Any) -> Callable[[Any, Any], dict[str, Any]] | None:
        """Predicts a task's rows; None where text is generated instead."""
        if source.encoded.format.generates:
            return None
        return build_predict_step(self.step, source.spec(), self.part(source))

    @property
    def segment(self) -> int:
        """Steps between two at which the run may be continued: above 1 where batches are made by its parameters."""
        return segment_of(self.data.train)

    def loader(
        self, params: Callable[[], Any], start: int, log: Callable[[str], None], stop: int | None = None
    ) -> Loader:
        """Training batches of the steps from `start` to before `stop` (None: the run's end).

        Args:
          params: gives the current parameters to a source that sees them. log: takes its lines.
        """
        source, prefetch = self.data.train, self.config.data.prefetch
        stop = self.config.steps if stop is None else stop
        if not refreshed(source):
            return Loader(source, self.step.batch_shardings, start, stop, prefetch=prefetch)
        from gpt_jax.rollout import RolloutLoader

        return RolloutLoader(source, self.step, params, start, stop, prefetch=prefetch, log=log)


def refreshed(source: Any) -> list[Any]:
    """Returns the sources in a source whose batches are made by the parameters: they have `refresh`."""
    return [part for part in getattr(source, "parts", {"": source}).values() if hasattr(part, "refresh")]


def segment_of(source: Any) -> int:
    return math.lcm(*(part.every for part in refreshed(source)))


def check_segments(config: Config, segment: int) -> None:
    """Raises UserError if the run would be saved where it cannot be continued with the same batches."""
    for name, steps in (("steps", config.steps), ("checkpoint.every_steps", config.checkpoint.every_steps)):
        if steps % segment:
            raise UserError(
                f"{name} is {steps}; it must be a multiple of objective.rollout_every ({segment}), so that a run is "
                "saved between rollouts."
            )


def build_run(config: Config, log: Callable[[str], None] = print, tokenizer: Tokenizer | None = None) -> Run:
    """Builds data, model, objective, optimizer and step of a config; raises UserError naming what does not fit.

    Args:
      tokenizer: of a run that was begun (`saved_tokenizer`), which is built again: its tokens stay what they are,
        whatever its data now are, and its config follows `init.from` no more.
    """
    if (
        config.deterministic
        and jax.default_backend() == "gpu"
        and "deterministic" not in os.environ.get("XLA_FLAGS", "")
    ):
        raise UserError(
            "deterministic=True on a GPU needs XLA_FLAGS=--xla_gpu_deterministic_ops=true in the environment."
        )
    mesh = mesh_of(config)
    check_rows(config, mesh)
    check_spec(config.objective)
    order = order_of(config, log)
    if tokenizer is None:
        config = following_init(config, log)
    data = prepare_data(
        config.data,
        context_length=config.context_length,
        batch_size=config.batch_size,
        eval_batch_size=config.eval.batch_size,
        seed=config.seed if config.data.seed < 0 else config.data.seed,
        batch_schedule=order.schedule,
        rows=lambda tokenizer: rows_of(
            config.objective, Host(tokenizer.specials, config.context_length, config.batch_size)
        ),
        tokenizer=tokenizer,
        log=log,
    )
    config = fill_in(config, data.tokenizer.vocab_size)
    setting = Setting(
        model=config.model,
        specials=data.tokenizer.specials,
        steps=config.steps,
        batch_size=config.batch_size,
        context_length=config.context_length,
        tasks=data.tasks,
    )
    objective = build_objective(config.objective, setting)
    data = dataclasses.replace(data, train=objective.feed(data.train))
    check_segments(config, segment_of(data.train))
    spec = data.train.spec()
    check_delivers(objective.batch_spec(config.batch_size, config.context_length), spec)

    if order.schedule:
        check_schedule(order.schedule, config.batch_size, config.microbatches)
        data = dataclasses.replace(data, train=RampedSource(data.train, config.microbatches))
    step = make_step(config, objective, spec, mesh, order)
    return Run(config, data, objective, step, order, tokens_before(config, order))


def order_of(config: Config, log: Callable[[str], None] | None = None) -> BatchOrder:
    """Returns how many rows each step of a run reads, and which batches are skipped."""
    schedule = resolve_batch_schedule(
        config.batch_schedule,
        batch_size=config.batch_size,
        context_length=config.context_length,
        steps=config.steps,
        micro=config.batch_size // config.microbatches,
        log=log,
    )
    return BatchOrder(config.batch_size, schedule, config.data.skip)


def tokens_before(config: Config, order: BatchOrder) -> Callable[[Any], Any]:
    """Returns step -> tokens in the batches of all steps before it."""
    return lambda step: rows_before(step, order) * config.context_length


def make_step(
    config: Config, objective: Objective, batch_spec: Any, mesh: Any, order: BatchOrder | None = None
) -> TrainStep:
    """Builds the optimizer and the train step of a config; nothing is compiled and no array made.

    Args:
      config: resolved, with vocab_size and max_positions filled in. objective: of the config.
      batch_spec: what the data delivers. mesh: of any devices, also those that only compile.
      order: which batches are smaller, and which are skipped; None: all are alike.
    """
    active, order = None, order or BatchOrder(config.batch_size)
    if order.schedule:
        size = config.batch_size // config.microbatches

        def active(step: Any) -> Any:
            return rows_at(step, order) // size

    o = config.optimizer
    rate = make_schedule(
        o.schedule,
        peak=o.learning_rate,
        steps=config.steps,
        warmup=o.warmup,
        decay=o.decay,
        cooldown=o.cooldown,
        end_factor=o.end_factor,
        tokens_at=tokens_before(config, order),
    )
    adapting = config.model.lora_rank and config.model.lora_freeze
    optimizer = make_optimizer(
        o.name,
        rate,
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        groups=(*([(LORA_BASE, {"frozen": True})] if adapting else []), *o.groups),
        layer_decay=o.layer_decay,
        pattern_length=len(config.model.pattern),
        kwargs=o.kwargs,
    )
    step = build_train_step(
        objective,
        optimizer,
        batch_spec,
        mesh=mesh,
        rules=(*config.mesh.rules, *DEFAULT_RULES),
        seed=config.seed,
        microbatches=config.microbatches,
        clip_norm=o.clip_norm,
        ema=o.ema,
        active_microbatches=active,
    )
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(step.abstract.all_params)]
    check_groups(o.groups, names)
    return step


def mesh_of(config: Config, devices: Sequence[jax.Device] | None = None) -> Any:
    """Returns the mesh of a config over `devices`; None is all there are. Its rules are checked as well."""
    check_rules(config.mesh.rules)
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    return make_mesh(sizes, devices, slices=config.mesh.slices, slice_axis=config.mesh.slice_axis)


def fill_in(config: Config, vocab_size: int) -> Config:
    """Fills in what a model takes from its surroundings: the tokenizer's vocabulary and the context's positions."""
    model = config.model
    if model.vocab_size and model.vocab_size < vocab_size:
        raise UserError(f"model.vocab_size is {model.vocab_size}, but the tokenizer has {vocab_size} tokens.")
    if 0 < model.max_positions < config.context_length and model.positions == "learned":
        raise UserError(
            f"model.max_positions is {model.max_positions}, fewer than context_length={config.context_length}."
        )
    model = dataclasses.replace(
        model,
        vocab_size=model.vocab_size or vocab_size,
        max_positions=model.max_positions or config.context_length,
        flatten=model.flatten and config.mesh.sequence == 1,
    )
    return dataclasses.replace(config, model=model)


def check_rows(config: Config, mesh: Any) -> None:
    """Raises UserError if the global batch does not divide by devices and micro-batches: before any data is built."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, rows, pieces in (
        ("batch_size", config.batch_size, config.microbatches),
        ("eval.batch_size", config.eval.batch_size or config.batch_size, 1),
    ):
        if rows < 1 or pieces < 1 or rows % (ways * pieces):
            raise UserError(
                f"{name} is {rows}, which {ways} devices (data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}) "
                f"x microbatches={pieces} do not divide."
            )


def check_delivers(wanted: Any, delivered: Any) -> None:
    """Raises UserError if the data does not deliver the fields that the objective's batch needs."""
    have = {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(delivered)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        name = path_name(path)
        if name not in have:
            raise UserError(f"the objective needs {name!r} in its batch; the data delivers {', '.join(sorted(have))}.")
        if tuple(have[name].shape) != tuple(leaf.shape):
            raise UserError(
                f"the objective needs {name!r} of shape {leaf.shape}; the data delivers {have[name].shape}."
            )


def placements(run: Run, source: Any) -> Any:
    """Shardings of a source's batches."""
    return batch_shardings(source.spec(), run.step.mesh)


def rebuild_run(workdir: str, overrides: Mapping[str, str] = MappingProxyType({})) -> Run:
    """Builds the run in a directory again, silently; raises what `saved_run` does."""
    config, tokenizer = saved_run(workdir, overrides)
    return build_run(config, lambda line: None, tokenizer)


def restore_run(
    workdir: str, *, step: int | None = None, weights: str = "auto", overrides: Mapping[str, str] | None = None
) -> tuple[Run, Any, int]:
    """Rebuilds a finished or running run from its workdir alone, for evaluation.

    Args:
      workdir: the run. step: a checkpoint's; None is the newest. weights: raw | ema | average | auto.
      overrides: of the saved config, e.g. {"data.path": "other.txt", "eval.batch_size": "8"}.

    Returns:
      (run, parameters on the mesh, step).

    Raises:
      UserError: no run there, no such checkpoint, a damaged one.
    """
    choose("weights", weights, ("auto", "raw", "ema", "average"))
    run = rebuild_run(workdir, overrides or {})
    abstract = run.step.abstract_state
    folder, found = find_checkpoint(workdir, step)
    state = restore(folder, found, dataclasses.replace(abstract, frozen={}))
    state = dataclasses.replace(state, frozen=restore_frozen(folder, abstract.frozen))
    return run, state.eval_params(weights), found
