"""What the devices of a job can do, measured in seconds: free memory, matrix products, collectives along mesh axes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt_jax import distributed

_SLOW = 0.8  # of the median rate: an accelerator below this is said to be slow
_FAR = 0.5  # of the published peak, for the same
_MIB = 1 << 20
_GATHERED = 1 << 30  # bytes at most that an all-gather leaves on a device


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
      name: what was looked at. ok: None where it was only measured, or left out. found: what was there, for people.
      values: the same for scripts.
    """

    name: str
    ok: bool | None
    found: str
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        mark = {True: "ok", False: "WRONG", None: "--"}[self.ok]
        return f"{mark.ljust(5)}  {self.name.ljust(20)} {self.found}"


def check_memory(needed: int, by: str = "") -> Check:
    """Free memory of the devices against what one needs; on CPU that of the host, shared by its devices.

    Args:
      needed: bytes of a device; 0 is not known. by: what says so.
    """
    import jax

    devices = jax.local_devices()
    free = [device_memory(device) for device in devices]
    if devices[0].platform == "cpu":
        free = [host_memory() // len(devices)] * len(devices)
    known = [value for value in free if value is not None]
    found = distributed.gather([platform.node(), min(known) if known else None])
    values = [entry[1] for entry in found]
    if None in values:
        return Check("memory", None, "this kind of device does not tell")
    least = min(values)
    where = values.index(least)
    text = f"{least / 2**30:.2f} GiB free on the fullest device"
    if needed and least < needed:
        text += f" (process {where} on {found[where][0]!r})"
    text += f", {needed / 2**30:.2f} GiB needed{by and f' ({by})'}" if needed else ", what is needed is not known"
    values = {"free_bytes": least, "needed_bytes": needed, "needed_by": by}
    return Check("memory", least >= needed if needed else None, text, values)


def device_memory(device: Any) -> int | None:
    """Free bytes of an accelerator, or None where it does not tell."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def host_memory() -> int:
    """Bytes of main memory that are available, as Linux says."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_matmul() -> Check:
    """The rate of a matrix product on every device, against the published peak and against the others."""
    import jax

    from gpt_jax.throughput import peak_flops

    devices = jax.local_devices()
    on_cpu = devices[0].platform == "cpu"
    mine, problem = attempt(lambda: [matmul_rate(device, 256 if on_cpu else 8192) for device in devices])
    found = distributed.gather([platform.node(), mine, problem])
    failed = failures([(host, problem) for host, _, problem in found])
    if failed:
        return Check("matmul", False, failed)
    found = [(host, those) for host, those, _ in found]
    rates = [rate for _, those in found for rate in those]
    middle, peak = statistics.median(rates), peak_flops(devices[0].device_kind)
    text = f"{min(rates) / 1e12:,.3g} to {max(rates) / 1e12:,.3g} TFLOP/s a device"
    if peak:
        text += f", {100 * middle / peak:.0f}% of the published {peak / 1e12:,.0f}"
    values = {"flops_per_s": [round(r) for r in rates], "peak_flops_per_s": peak}
    if on_cpu:  # its devices share the cores: nothing to compare with
        return Check("matmul", None, text, values)
    ranked = sorted((rate, k, host, i) for k, (host, those) in enumerate(found) for i, rate in enumerate(those))
    slow = [
        f"process {k} on {host!r}: device {i} at {rate / 1e12:,.3g}"
        for rate, k, host, i in ranked
        if rate < _SLOW * middle or (peak and rate < _FAR * peak)
    ]
    return Check("matmul", not slow, f"{text}; slow: {', '.join(slow[:4])}" if slow else text, values)


def attempt(measure: Callable[[], Any]) -> tuple[Any, str]:
    """Returns (what `measure` does, ''), or (None, what the runtime refuses it with: no memory, a broken device)."""
    import jax

    try:
        return measure(), ""
    except jax.errors.JaxRuntimeError as error:
        if distributed.several() and distributed.is_lost(error):
            raise  # another process's end, which is told as such
        return None, " ".join(str(error).split())[:200]


def failures(problems: Sequence[tuple[str, str]]) -> str:
    """Returns a sentence on the processes, given as (host, problem) by process, that have one; '' if none has."""
    return "; ".join(f"process {k} on {host!r}: {problem}" for k, (host, problem) in enumerate(problems) if problem)


def matmul_rate(device: Any, size: int, repeats: int = 5) -> float:
    """FLOP/s of a product of two square matrices on a device: bfloat16, on CPU float32. The best of `repeats`."""
    import jax
    import jax.numpy as jnp

    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    a = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def check_collectives(mesh: Any) -> list[Check]:
    """All-reduce and all-gather along every axis of a mesh: the right numbers, and how fast."""
    out = []
    for axis in mesh.axis_names:
        if mesh.shape[axis] > 1:
            out += [measure_collective(mesh, axis, kind) for kind in ("all-reduce", "all-gather")]
    return out


def collective_size(platform: str, kind: str, ways: int) -> int:
    """Bytes per device to measure with: 1 MiB on CPU, 64 MiB elsewhere, less where many devices would gather it all."""
    size = _MIB if platform == "cpu" else 64 * _MIB
    return min(size, _GATHERED // ways // 4 * 4) if kind == "all-gather" else size


def measure_collective(mesh: Any, axis: str, kind: str, size: int = 0, repeats: int = 5) -> Check:
    """Runs a collective along a mesh axis, every device with its own number, and checks what each one got.

    Args:
      size: bytes per device; 0 is `collective_size`.

    Returns:
      A Check with the bus bandwidth per device: bytes that a ring sends, 2 (n - 1) / n of the result of an all-reduce
      and (n - 1) / n of an all-gather's, over the best time.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    ways, shape = mesh.shape[axis], tuple(mesh.shape.values())
    size = size or collective_size(mesh.devices.flat[0].platform, kind, ways)
    spec = PartitionSpec(*mesh.axis_names, None)
    sharding = NamedSharding(mesh, spec)
    numbers = np.arange(mesh.size, dtype=np.float32).reshape(shape)

    def local(index: tuple[slice, ...]) -> np.ndarray:
        return np.broadcast_to(numbers[index[:-1]][..., None], (*(1,) * len(shape), size // 4))

    along = mesh.axis_names.index(axis)

    def collective(block: jax.Array) -> jax.Array:
        if kind == "all-reduce":
            return jax.lax.psum(block, axis)
        return jnp.sum(jax.lax.all_gather(block, axis), axis=0)  # summed: one expectation serves both

    run = jax.jit(jax.shard_map(collective, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    expected = np.broadcast_to(numbers.sum(along, keepdims=True), shape)

    def measure() -> list[Any]:
        x = jax.make_array_from_callback((*shape, size // 4), sharding, local)
        result = run(x)
        right = all(np.all(np.asarray(s.data) == expected[s.index[:-1]][..., None]) for s in result.addressable_shards)
        best = math.inf
        for _ in range(repeats):
            start = time.perf_counter()
            run(x).block_until_ready()
            best = min(best, time.perf_counter() - start)
        return [bool(right), best]

    mine, problem = attempt(measure)
    found = distributed.gather([platform.node(), problem, *(mine or (False, math.inf))])
    failed = failures([entry[:2] for entry in found])
    if failed:
        return Check(f"{kind} {axis}", False, failed)
    found = [(host, right, best) for host, _, right, best in found]
    wrong = [f"process {k} on {host!r}" for k, (host, ok, _) in enumerate(found) if not ok]
    slowest = max(entry[2] for entry in found)
    sent = size * (2 * (ways - 1) / ways if kind == "all-reduce" else (ways - 1))
    rate = sent / slowest / 1e9
    text = f"{rate:.3g} GB/s a device, {ways} devices, {size / _MIB:.3g} MiB each"
    if wrong:
        text = f"wrong numbers on {', '.join(wrong)}"
    return Check(f"{kind} {axis}", not wrong, text, {"gb_per_s": round(rate, 4), "bytes": size})
