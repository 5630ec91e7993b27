"""Compiler flags, one table for all backends. `compiler.flags` of the config picks it, `compiler.extra` adds to it.

A flag that the environment names already is left as it is. XLA reads its flags when the first device is touched, so
they are set before; on CPU they go with single programs (`options`), as the fastest differ from one to the next.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import jaxlib.version

from gpt_jax.errors import UserError, choose

XLA, LIBTPU = "XLA_FLAGS", "LIBTPU_INIT_ARGS"
ENVIRONMENT = "environment"  # where a variable of its own stands, not a flag within one
USABLE = 0.92  # of a chip's memory, as a plan counts: the rest is the runtime's, and fragments

# jaxlib reads both and refuses two that are set; the second is the older name.
_FRACTION = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of the compiler.

    Attributes:
      backend: cpu | gpu | tpu. where: the environment variable that holds it, or ENVIRONMENT if it is one; on CPU the
        program it goes with.
      name, value: without the leading '--'. why: what it is for.
    """

    backend: str
    where: str
    name: str
    value: Any
    why: str


TABLE = (
    # CPU. On it Eigen's products are faster than those of YNNPACK, jaxlib 0.10's default (an empty list is none).
    Flag("cpu", "update", "xla_cpu_experimental_ynn_fusion_type", "", "Eigen's matrix products (docs/LOG.md)"),
    Flag("cpu", "init", "xla_backend_optimization_level", 1, "drawing weights takes longer to optimise than to run"),
    # GPU: communication runs beside computation. JAX's page on GPU performance describes each.
    Flag("gpu", XLA, "xla_gpu_enable_latency_hiding_scheduler", "true", "starts collectives as early as it can"),
    Flag("gpu", XLA, "xla_gpu_enable_pipelined_all_gather", "true", "FSDP: a layer's parameters come ahead of it"),
    Flag("gpu", XLA, "xla_gpu_enable_pipelined_reduce_scatter", "true", "and its gradient leaves behind it"),
    Flag("gpu", XLA, "xla_gpu_enable_pipelined_all_reduce", "true", "data parallelism: the same for its gradients"),
    Flag("gpu", XLA, "xla_gpu_all_gather_combine_threshold_bytes", "134217728", "few large messages, not many small"),
    Flag("gpu", XLA, "xla_gpu_reduce_scatter_combine_threshold_bytes", "134217728", "as above"),
    Flag("gpu", XLA, "xla_gpu_all_reduce_combine_threshold_bytes", "134217728", "as above"),
    Flag("gpu", ENVIRONMENT, _FRACTION[0], USABLE, "the memory that a plan counts on; JAX takes 75% by itself"),
    # TPU: the same, in libtpu's words.
    Flag("tpu", LIBTPU, "xla_tpu_enable_async_collective_fusion", "true", "collectives run beside computation"),
    Flag("tpu", LIBTPU, "xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "all-gathers too (FSDP)"),
    Flag("tpu", LIBTPU, "xla_tpu_enable_async_collective_fusion_multiple_steps", "true", "over several fusions"),
    Flag("tpu", LIBTPU, "xla_tpu_overlap_compute_collective_tc", "true", "beside the matrix units as well"),
    Flag("tpu", LIBTPU, "xla_enable_async_all_gather", "true", "all-gathers start early"),
)


def options(program: str) -> dict[str, Any]:
    """Returns the CPU options of a program ('update', 'init'), for `jax.jit(compiler_options=...)`."""
    return {flag.name: flag.value for flag in TABLE if flag.backend == "cpu" and flag.where == program}


def options_on(program: str, platform: str) -> dict[str, Any] | None:
    """Returns the options of a program on a CPU, None elsewhere: experimental, so that another jaxlib may refuse."""
    return options(program) if platform == "cpu" and jaxlib.version.__version__.startswith("0.10.") else None


def backend_here(environ: Mapping[str, str], devices: pathlib.Path = pathlib.Path("/dev")) -> str:
    """Returns which backend jax will choose, without asking it (that would fix the flags): cpu | gpu | tpu."""
    from gpt_jax.cluster import on_tpu_machine

    platforms = environ.get("JAX_PLATFORMS", "")
    if on_tpu_machine(environ):
        return "tpu"
    on_gpu_machine = any(devices.glob("nvidia[0-9]*")) and not platforms  # a container may be given number 3 alone
    return "gpu" if on_gpu_machine or any(name in platforms for name in ("cuda", "gpu")) else "cpu"


def flags_for(backend: str, preset: str = "default", extra: Sequence[str] = ()) -> dict[str, list[str]]:
    """Returns {environment variable: ['--name=value', ...]} of a backend.

    Args:
      preset: default (the table's) | none. extra: further flags, '--name=value'; they win over the table's.

    Raises:
      UserError: an unknown preset, an extra flag of another form.
    """
    choose("compiler.flags", preset, ("default", "none"))
    out: dict[str, dict[str, str]] = {}
    if preset == "default":
        for flag in TABLE:
            if flag.backend == backend and flag.where in (XLA, LIBTPU):
                out.setdefault(flag.where, {})[flag.name] = f"--{flag.name}={flag.value}"
    for text in extra:
        found = re.fullmatch(r"--(\w+)=\S*", text)
        if found is None:
            raise UserError(f"compiler.extra has {text!r}; a flag is written '--name=value'.")
        out.setdefault(LIBTPU if backend == "tpu" else XLA, {})[found[1]] = text
    return {variable: list(flags.values()) for variable, flags in out.items()}


def compile_options(
    backend: str, preset: str = "default", extra: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Returns the flags that a run on a backend would have, as options of one program that is compiled ahead for it.

    Args:
      preset, extra: see `flags_for`. environ: whose flags are in force already and left out; None is this process's.
    """
    environ = os.environ if environ is None else environ
    out: dict[str, Any] = {}
    for variable, flags in flags_for(backend, preset, extra).items():
        named = {word.split("=")[0] for word in environ.get(variable, "").split()}
        for name, _, value in (flag.partition("=") for flag in flags):
            if name not in named:
                out[name.removeprefix("--")] = {"true": True, "false": False}.get(value, value)
    return out


def apply_flags(
    preset: str = "default",
    extra: Sequence[str] = (),
    environ: MutableMapping[str, str] | None = None,
    backend: str = "",
) -> list[str]:
    """Puts the flags of the backend at hand into the environment; before jax touches a device.

    Args:
      preset, extra: see `flags_for`. environ: None is this process's. backend: None finds out.

    Returns:
      The flags and variables ('NAME=value') that were added.
    """
    environ = os.environ if environ is None else environ
    backend, added = backend or backend_here(environ), []
    for variable, flags in flags_for(backend, preset, extra).items():
        there = environ.get(variable, "")
        named = {word.split("=")[0] for word in there.split()}
        new = [flag for flag in flags if flag.split("=")[0] not in named]
        environ[variable] = " ".join([there, *new]).strip()
        added += new
    for flag in TABLE if preset == "default" else ():
        if (flag.backend, flag.where) == (backend, ENVIRONMENT) and not any(environ.get(name) for name in _FRACTION):
            environ[flag.name] = str(flag.value)
            added.append(f"{flag.name}={flag.value}")
    return added
