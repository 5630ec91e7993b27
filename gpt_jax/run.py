"""From a resolved config to the parts of a run: data, objective, optimizer, train step.

Every command (train, eval, plan) builds a run here, so that none has a special path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from gpt_jax.config import Config
from gpt_jax.data import Data, prepare_data
from gpt_jax.data.batches import resolve_batch_schedule
from gpt_jax.data.ramp import RampedSource, check_schedule, rows_at, rows_before
from gpt_jax.errors import UserError
from gpt_jax.objectives.base import Objective, Setting, build_objective
from gpt_jax.optim import check_groups, make_optimizer, make_schedule
from gpt_jax.sharding import DEFAULT_RULES, batch_shardings, make_mesh, path_name
from gpt_jax.step import TrainStep, build_eval_step, build_train_step


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run.

    Attributes:
      config: with vocab_size and max_positions filled in. data, objective, step: see their modules.
      tokens_at: tokens in all batches before a step (a batch-size schedule summed).
    """

    config: Config
    data: Data
    objective: Objective
    step: TrainStep
    tokens_at: Callable[[Any], Any]

    def evaluator(self, source: Any) -> Callable[[Any, Any, int], dict[str, Any]]:
        return build_eval_step(self.step, source.spec(), seed=self.config.seed)


def build_run(config: Config, log: Callable[[str], None] = print) -> Run:
    """Builds data, model, objective, optimizer and step of a config; raises UserError naming what does not fit."""
    if config.deterministic and jax.default_backend() == "gpu" and "deterministic" not in _xla_flags():
        raise UserError(
            "deterministic=True on a GPU needs XLA_FLAGS=--xla_gpu_deterministic_ops=true in the environment."
        )
    mesh = make_mesh(dataclasses.asdict(config.mesh) | {"rules": None})
    check_rows(config, mesh)
    schedule = resolve_batch_schedule(
        config.batch_schedule, batch_size=config.batch_size, context_length=config.context_length, steps=config.steps
    )
    data = prepare_data(
        config.data,
        context_length=config.context_length,
        batch_size=config.batch_size,
        eval_batch_size=config.eval.batch_size,
        seed=config.seed if config.data.seed < 0 else config.data.seed,
        batch_schedule=schedule,
        log=log,
    )
    config = fill_in(config, data.tokenizer.vocab_size)
    setting = Setting(
        model=config.model,
        specials=data.tokenizer.specials,
        steps=config.steps,
        batch_size=config.batch_size,
        context_length=config.context_length,
    )
    objective = build_objective(config.objective, setting)
    spec = data.train.spec()
    check_delivers(objective.batch_spec(config.batch_size, config.context_length), spec)

    def tokens_at(step: Any) -> Any:
        return rows_before(step, schedule, config.batch_size) * config.context_length

    active = None
    if schedule:
        check_schedule(schedule, config.batch_size, config.microbatches)
        data = dataclasses.replace(data, train=RampedSource(data.train, config.microbatches))
        size = config.batch_size // config.microbatches

        def active(step: Any) -> Any:
            return rows_at(step, schedule, config.batch_size) // size

    o = config.optimizer
    rate = make_schedule(
        o.schedule,
        peak=o.learning_rate,
        steps=config.steps,
        warmup=o.warmup,
        decay=o.decay,
        cooldown=o.cooldown,
        end_factor=o.end_factor,
        tokens_at=tokens_at,
    )
    optimizer = make_optimizer(
        o.name, rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, groups=o.groups, kwargs=o.kwargs
    )
    step = build_train_step(
        objective,
        optimizer,
        spec,
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
    return Run(config, data, objective, step, tokens_at)


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


def _xla_flags() -> str:
    import os

    return os.environ.get("XLA_FLAGS", "")
