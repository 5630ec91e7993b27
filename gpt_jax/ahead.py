"""A config's train step compiled for a machine, and what the compiled program says: memory, FLOPs, communication.

The step is the real one (`run.make_step`), from shapes: no parameter and no data is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from gpt_jax.compiler_flags import compile_options
from gpt_jax.config import Config
from gpt_jax.data.prepare import spec_of, tasks_of
from gpt_jax.data.tokenizer_choice import existing_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.flops import count_flops, parameters_in, step_flops_per_token
from gpt_jax.hlo import Collective, read_program
from gpt_jax.inherit import following_init
from gpt_jax.objectives.base import Host, Setting, build_objective, rows_of
from gpt_jax.presets import GPT2_VOCAB
from gpt_jax.remote import is_url
from gpt_jax.run import check_rows, fill_in, make_step, mesh_of, order_of
from gpt_jax.sharding import path_name, replicated_bytes
from gpt_jax.step import TrainStep
from gpt_jax.topologies import Machine


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A train step compiled for a machine. All bytes are those of one chip, all FLOPs those of all chips.

    Attributes:
      config: with everything filled in. mesh: axis -> devices. params: of all models, padding excluded.
      state_bytes: arguments (state and batch). temporary_bytes: outputs - aliased + temporaries.
      host_bytes: what remat offloads to the host. flops: of matrix products, recomputation included.
      model_flops: 6 N + 12 L D T per token, less of what is frozen (`step_flops_per_token`).
      memory_traffic: bytes to and from HBM in a step.
      unknown_loops: loops whose length the program does not say, counted as `microbatches`.
      replicated: part of the parameters' bytes that every fsdp shard holds whole, and which those are.
      stand_in: whether attention in chunks stands in for cuDNN's, whose memory traffic is less.
      program: whether the compiler made one; where the program does not fit it may refuse.
    """

    config: Config
    mesh: dict[str, int]
    params: int
    state_bytes: int
    temporary_bytes: int
    host_bytes: int
    flops: float
    model_flops: float
    collectives: tuple[Collective, ...]
    memory_traffic: float
    unknown_loops: int
    replicated: tuple[float, list[str]]
    compile_s: float
    stand_in: bool
    program: bool

    @property
    def hbm_bytes(self) -> int:
        return self.state_bytes + self.temporary_bytes

    @property
    def shards(self) -> int:
        """Pieces that a batch is cut into by rows; the chips of the tensor and sequence axes share one."""
        return self.mesh["data"] * self.mesh["fsdp"]

    @property
    def rows(self) -> int:
        """Sequences of a (micro-)batch on one shard of it."""
        return self.config.batch_size // (self.config.microbatches * self.shards)


def abstract_step(config: Config, machine: Machine) -> tuple[Config, TrainStep]:
    """Returns the config, filled in, and its train step on a machine, without data; raises UserError if it cannot be.

    The vocabulary is `model.vocab_size`, or else what the tokenizer would have. For a GPU that is not here, attention
    in chunks stands in for cuDNN's.
    """
    mesh = mesh_of(config, machine.devices)
    check_rows(config, mesh)
    order = order_of(config)
    config = following_init(config, lambda line: None)
    config = fill_in(config, vocabulary_of(config))
    if machine.chip and machine.chip.platform == "gpu" and config.model.attention in ("auto", "cudnn"):
        _check_cudnn(config, machine.chip.name)
        # cuDNN's kernels cannot be chosen without a GPU; these need about the memory that they do.
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="chunks"))
    names = config.data.tokenizer.specials
    specials = {name: config.model.vocab_size - len(names) + i for i, name in enumerate(names)}
    rows = rows_of(config.objective, Host(specials, config.context_length, config.batch_size))
    setting = Setting(
        model=config.model,
        specials=specials,
        steps=config.steps,
        batch_size=config.batch_size,
        context_length=config.context_length,
        tasks=tasks_of(config.data, rows),
    )
    objective = build_objective(config.objective, setting)
    spec = objective.batch_spec(config.batch_size, config.context_length)
    spec = trained_on(spec, spec_of(config.data, rows, config.batch_size, config.context_length))
    return config, make_step(config, objective, spec, mesh, order)


def trained_on(wanted: Any, delivered: Any) -> Any:
    """A batch of the step: what the data delivers, but where rollouts are made of it, what the objective wants."""
    if any(isinstance(part, Mapping) for part in delivered.values()):
        return {name: trained_on(wanted[name], part) for name, part in delivered.items()}
    return delivered if wanted.keys() <= delivered.keys() else wanted


def _check_cudnn(config: Config, chip: str) -> None:
    """Refuses what the run would refuse of cuDNN's attention, where it is asked for by name."""
    model, largest = config.model, 128 if chip == "a100" else 256
    asked = {
        "documents kept apart": config.data.doc_mask,
        f"head sizes above {largest} on {chip}": model.key_size > largest,
        "head sizes that 8 does not divide": model.key_size % 8,
        "a sequence that the mesh cuts": config.mesh.sequence > 1,
    }
    missing = [what for what, asks in asked.items() if asks]
    if model.attention == "cudnn" and missing:
        raise UserError(f"model.attention is 'cudnn', which does not support {', '.join(missing)}.")


def vocabulary_of(config: Config) -> int:
    """Returns the size of a config's vocabulary without making its tokenizer; raises UserError where it cannot."""
    tokenizer = config.data.tokenizer
    if config.model.vocab_size:
        return config.model.vocab_size
    if tokenizer.keep:
        return tokenizer.keep + len(tokenizer.specials)
    path = tokenizer.path
    if path and (is_url(path) or os.path.exists(os.path.expandvars(path))):
        return existing_tokenizer(tokenizer).vocab_size
    if tokenizer.kind == "gpt2":
        return GPT2_VOCAB + len([name for name in tokenizer.specials if name != "eot"])
    if tokenizer.kind in ("unigram", "bpe") and not path:
        return tokenizer.vocab_size
    if tokenizer.kind == "byte":
        return 256 + len(tokenizer.specials)
    raise UserError(
        f"the vocabulary of a {tokenizer.kind!r} tokenizer is not known before it is made or read: "
        "give it, e.g. --config.model.vocab_size=32000."
    )


def compile_step(config: Config, machine: Machine) -> Compiled:
    """Compiles a config's train step for a machine; raises UserError for a config that cannot be."""
    asked = config.model.attention
    config, step = abstract_step(config, machine)
    started = time.perf_counter()
    traced = step.trace()
    flops = count_flops(traced.jaxpr, trips=config.microbatches)
    params = count_params(step, config)
    common = dict(
        config=config,
        mesh=dict(step.mesh.shape),
        params=params,
        stand_in=config.model.attention != asked,
        flops=flops,
        replicated=replicated_bytes(step.abstract.all_params, step.param_shardings),
        model_flops=config.batch_size
        * config.context_length
        * step_flops_per_token(step.abstract, config.model, config.context_length),
    )
    flags = None
    if machine.chip:
        flags = compile_options(machine.chip.platform, config.compiler.flags, config.compiler.extra)
    try:
        with step.context(), without_cache():
            compiled = traced.lower().compile(compiler_options=flags)
    except jax.errors.JaxRuntimeError as error:
        used = used_bytes(str(error))
        if re.search(r"compile option|setting option|into flag", str(error)):
            said = str(error).splitlines()[0]
            raise UserError(f"compiler.extra is {config.compiler.extra!r}; the compiler says: {said}") from None
        if used is None:
            raise
        state = shard_bytes(step)
        return Compiled(
            **common,
            state_bytes=state,
            temporary_bytes=max(used - state, 0),
            host_bytes=0,
            collectives=(),
            memory_traffic=0.0,
            unknown_loops=0,
            compile_s=time.perf_counter() - started,
            program=False,
        )
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    program = read_program(compiled.as_text(), domains=domains(step.mesh, machine), trips=config.microbatches)
    return Compiled(
        **common,
        state_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        host_bytes=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        collectives=program.collectives,
        memory_traffic=program.memory_bytes,
        unknown_loops=program.unknown_loops,
        compile_s=seconds,
        program=True,
    )


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Keeps programs out of jax's compilation cache: one for a machine that is not here cannot be loaded from it."""
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def count_params(step: TrainStep, config: Config) -> int:
    """Returns the parameters of all models, rows that pad a vocabulary excluded."""
    leaves = jax.tree_util.tree_leaves_with_path(step.abstract.all_params)
    return sum(parameters_in(path_name(path), leaf.shape, config.model) for path, leaf in leaves)


def shard_bytes(step: TrainStep) -> int:
    """Returns the bytes of state and batch on one device."""
    leaves = (*jax.tree.leaves(step.abstract), *jax.tree.leaves(step.batch_spec))
    placed = (*jax.tree.leaves(step.shardings), *jax.tree.leaves(step.batch_shardings))
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(leaves, placed, strict=True)
    )


def used_bytes(message: str) -> int | None:
    """Reads out of a compiler's refusal how many bytes a program needs; None if it is about something else."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    if not found:
        return None
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))


def domains(mesh: Any, machine: Machine) -> list[int]:
    """Returns, for each device of the mesh in order, the number of the slice or host it belongs to."""
    place = {id(device): i for i, device in enumerate(machine.devices)}
    return [place[id(device)] // machine.group for device in mesh.devices.flat]
