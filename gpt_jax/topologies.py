"""Machines that are not here: TPU slices and GPU clusters as devices that programs can be compiled for.

`describe("v5p:8x16x16")` or `describe("h100:128x8")` gives jax devices that only compile, and the figures of the chip.
The calls that jax does not document are all in this file, and tests/test_topologies.py pins them. TPUs need libtpu
(extra `tpu`), GPUs jax's CUDA plugin (extra `cuda`, or the plugin alone); neither an accelerator or a driver.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
from typing import Any

import jax

from gpt_jax.errors import UserError, choose

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One jax device. All rates are published ones, per chip and per second, in FLOP or bytes.

    Attributes:
      name: as --topology spells it. platform: tpu | gpu. peak: dense bf16 FLOP/s. capacity: bytes of HBM.
      hbm: bytes/s to HBM. link: bytes/s out of a chip to its slice (ICI, all links) or host (NVLink), one direction.
      network: bytes/s out of a chip beyond that (DCN between slices; InfiniBand between hosts), one direction.
      dimensions: of a TPU slice's torus, 0 for GPUs.
    """

    name: str
    platform: str
    peak: float
    capacity: int
    hbm: float
    link: float
    network: float
    dimensions: int = 0


# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} (bidirectional ICI bandwidths halved); DCN: what a host's network
# card gives each of its chips. GPUs: NVIDIA's data sheets of the SXM models (NVLink halved), one 200 or 400 Gb/s
# network card per GPU.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", 275e12, 32 * GIB, 1.228e12, 300e9, 6.25e9, 3),
        Chip("v5e", "tpu", 197e12, 16 * GIB, 0.819e12, 200e9, 3.125e9, 2),
        Chip("v5p", "tpu", 459e12, 95 * GIB, 2.765e12, 600e9, 6.25e9, 3),
        Chip("v6e", "tpu", 918e12, 32 * GIB, 1.640e12, 400e9, 12.5e9, 2),
        Chip("a100", "gpu", 312e12, 80 * 10**9, 2.039e12, 300e9, 25e9),
        Chip("h100", "gpu", 989e12, 80 * 10**9, 3.352e12, 450e9, 50e9),
        Chip("h200", "gpu", 989e12, 141 * 10**9, 4.8e12, 450e9, 50e9),
    )
}

# XLA's description of a GPU (GpuTargetConfigProto): what its compiler asks a device that is there.
_GPU_FACTS = {
    "a100": dict(major=8, cores=108, shared=167936, optin=166912, l2=41943040, clock=1.41),
    "h100": dict(major=9, cores=132, shared=233472, optin=232448, l2=52428800, clock=1.98),
    "h200": dict(major=9, cores=132, shared=233472, optin=232448, l2=52428800, clock=1.98),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices to compile for.

    Attributes:
      name: e.g. 'v5p:8x16x16'. devices: jax devices, in order. chip: their figures; None for simulated ones.
      group: devices that the fast network joins: a slice, a GPU host, or all.
    """

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None
    group: int


def parse(text: str) -> tuple[Chip, tuple[int, ...]]:
    """'v5e:16x16' -> (chip, (16, 16)); raises UserError naming what is wrong."""
    kind, colon, sizes = text.partition(":")
    choose("the kind of a topology", kind, CHIPS)
    chip = CHIPS[kind]
    want = chip.dimensions or 2
    shape = "hosts x GPUs of a host" if chip.platform == "gpu" else f"{want} sides of the torus"
    example = {"gpu": "4x8", "tpu": "x".join(["4"] * want)}[chip.platform]
    if not colon or not re.fullmatch(r"\d+(x\d+)*", sizes) or len(sizes.split("x")) != want or "0" in sizes.split("x"):
        raise UserError(f"the topology {text!r} is not {kind}:SIZES with {shape}, e.g. {kind}:{example}.")
    return chip, tuple(int(n) for n in sizes.split("x"))


def describe(text: str, slices: int = 1) -> Machine:
    """Returns the machine of a topology; raises UserError for one that is unknown or whose compiler is not installed.

    Args:
      text: CHIP:SIZES, the torus of a TPU slice or hosts x GPUs. slices: TPU slices of that size.
    """
    chip, sizes = parse(text)
    if chip.platform == "gpu":
        return Machine(text, _gpu_devices(chip.name, *sizes), chip, sizes[1])
    name = text if slices == 1 else f"{slices}*{text}"
    return Machine(name, _tpu_devices(text, slices), chip, math.prod(sizes))


def simulated(count: int) -> Machine:
    """Returns `count` simulated devices of this CPU; raises UserError if jax has already started with fewer."""
    if count < 1:
        raise UserError(f"--devices is {count}; it must be at least 1.")
    if not _started() and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"--devices is {count}, but jax has already started with {len(devices)}.")
    return Machine(f"{count} simulated", tuple(devices[:count]), None, count)


def _started() -> bool:
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


@functools.cache
def _tpu_devices(name: str, slices: int) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"the topology {name!r} needs libtpu to compile for: pip install -e '.[tpu]'.")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to ask for a TPU
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it locks a TPU that is not there; several may compile
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # a chip is one device, as the other kinds have it anyway
    if math.prod(parse(name)[1]) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        with _quiet():
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu knows no topology {name!r}: {str(error).splitlines()[0]}") from None
    return tuple(found.devices)


def has_cuda_plugin() -> bool:
    """Whether a CUDA plugin of jax is installed; a GPU need not be there."""
    found = []
    for package in ("xla_cuda12", "xla_cuda13"):
        with contextlib.suppress(ModuleNotFoundError):
            found.append(importlib.util.find_spec(f"jax_plugins.{package}"))
    return any(found)


@functools.cache
def _gpu_devices(name: str, hosts: int, gpus: int) -> tuple[Any, ...]:
    if not has_cuda_plugin():
        raise UserError(
            f"the topology '{name}:{hosts}x{gpus}' needs jax's CUDA plugin to compile for (no GPU, no driver): "
            f"pip install --no-deps jax-cuda12-pjrt=={jax.__version__} jax-cuda12-plugin=={jax.__version__}."
        )
    from jax.experimental import topologies

    with _quiet():
        found = topologies.get_topology_desc(
            platform="cuda", topology=f"1x{hosts}x{gpus}", target_config=target_config(name)
        )
    return tuple(found.devices)


def target_config(name: str) -> str:
    """Returns XLA's GpuTargetConfigProto, as text, of a GPU."""
    chip, facts = CHIPS[name], _GPU_FACTS[name]
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {facts["major"]} minor: 0 }}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 fpus_per_core: 64
  shared_memory_per_block: 49152 shared_memory_per_core: {facts["shared"]}
  shared_memory_per_block_optin: {facts["optin"]}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 core_count: {facts["cores"]}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.hbm)} l2_cache_size: {facts["l2"]} clock_rate_ghz: {facts["clock"]}
  device_memory_size: {chip.capacity} runtime_version: "12.9.0" driver_version: "12.9.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name.upper()}"
"""


class _quiet:
    """Sends what native libraries write to stderr while they load into the void."""

    def __enter__(self) -> None:
        self._saved = os.dup(2)
        self._void = os.open(os.devnull, os.O_WRONLY)
        os.dup2(self._void, 2)

    def __exit__(self, *error: Any) -> None:
        os.dup2(self._saved, 2)
        os.close(self._saved)
        os.close(self._void)
