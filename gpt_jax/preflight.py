"""The pre-flight: is everything here that a run needs, on every host, before hours are spent on finding out.

    code = run_preflight(config, workdir="runs/x")          # `gpt-jax plan --here`, one process per host

Every process checks its own part and all hear of all: what is wrong is said once, with the process and the host that
is odd. Under a minute: what does not fit into the time is left out and said so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt_jax import distributed
from gpt_jax.errors import UserError

_SLOW = 0.8  # of the median rate: an accelerator below this is said to be slow
_FAR = 0.5  # of the published peak, for the same
_MIB = 1 << 20


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


def run_preflight(
    config: Any,
    *,
    workdir: str = "",
    needed_bytes: int = 0,
    seconds: float = 60.0,
    environ: Mapping[str, str] | None = None,
    log: Callable[[str], None] = print,
) -> int:
    """Checks the devices and hosts at hand; joins the other processes of the job first (`distributed.initialize`).

    Args:
      config: a resolved Config: its mesh, data and `distributed.*` say what is expected.
      workdir: written to and read from, if given. needed_bytes: what a device needs by the plan; 0 asks for the state's
        own size at least, where the config says it. seconds: the time there is.
      environ: where the job is described; None is this process's. log: takes the lines of process 0.

    Returns:
      0 if all is well, 1 if anything is wrong: each is a line. The last line that process 0 logs is JSON.

    Raises:
      Unavailable: processes are missing. UserError: code, versions or config differ between processes; a bad mesh.
    """
    from gpt_jax import config as configs
    from gpt_jax.compiler_flags import apply_flags
    from gpt_jax.data.cache import cache_root

    began = time.monotonic()
    apply_flags(config.compiler.flags, config.compiler.extra)
    distributed.initialize(
        environ,
        heartbeat_seconds=config.distributed.heartbeat_seconds,
        join_seconds=min(config.distributed.join_seconds, seconds),
        facts={"the config": distributed.fingerprint(configs.to_dict(config)), "--workdir": workdir},
    )
    say = distributed.said_once(log)
    needed = needed_bytes or state_bytes(config)
    steps: list[Callable[[], list[Check]]] = [
        lambda: [check_processes()],
        lambda: check_devices(config.distributed.devices, config.distributed.device_kind),
        lambda: [check_data(config.data)],
        lambda: [check_memory(needed)],
        lambda: [check_folder("workdir", workdir, shared=True)] if workdir else [],
        lambda: [check_folder("cache", str(cache_root()), shared=False)],
        lambda: [check_matmul()],
        lambda: check_collectives(mesh_sizes(config)),
    ]
    checks: list[Check] = []
    for step in steps:
        late = time.monotonic() - began > 0.8 * seconds
        if distributed.decide(late):
            checks.append(Check("time", None, f"the rest was left out after {time.monotonic() - began:.0f} s"))
            say(str(checks[-1]))
            break
        for check in step():
            checks.append(check)
            say(str(check))
    wrong = [check.name for check in checks if check.ok is False]
    result = {
        "ok": not wrong,
        "wrong": wrong,
        "checks": {check.name: {"ok": check.ok, "found": check.found, **check.values} for check in checks},
        "seconds": round(time.monotonic() - began, 1),
    }
    say(json.dumps(result))
    return 1 if wrong else 0


def mesh_sizes(config: Any) -> dict[str, int]:
    return {axis: size for axis, size in dataclasses.asdict(config.mesh).items() if axis != "rules"}


def state_bytes(config: Any) -> int:
    """Bytes of a device's share of parameters, gradient and Adam's moments; 0 where the vocabulary is not known yet."""
    import jax

    from gpt_jax.model.config import count_parameters
    from gpt_jax.sharding import make_mesh

    if not config.model.vocab_size:
        return 0
    mesh = make_mesh(mesh_sizes(config)).shape
    itemsize = jax.numpy.dtype(config.model.param_dtype).itemsize
    return count_parameters(config.model) * itemsize * 4 // (mesh["fsdp"] * mesh["tensor"])


# ---- hosts


def check_processes() -> Check:
    """All processes answer, with the same versions and code (the roll call has refused others already)."""
    hosts = distributed.gather(platform.node())
    return Check(
        "processes",
        True,
        f"{len(hosts)} on {len(set(hosts))} host{'s' * (len(set(hosts)) != 1)}, same code, versions and config",
        {"processes": len(hosts), "hosts": sorted(set(hosts))},
    )


def check_devices(count: int, kind: str) -> list[Check]:
    """Kinds and numbers of devices against the expected ones (0, '': whatever), and each process's with the others'."""
    import jax

    mine = sorted({d.device_kind for d in jax.local_devices()}), len(jax.local_devices())
    found = distributed.gather([platform.node(), *mine])
    total = sum(entry[2] for entry in found)
    kinds = [", ".join(entry[1]) for entry in found]
    wrong = [k for k, name in enumerate(kinds) if kind and kind.lower() not in name.lower()]
    if not kind:
        wrong = odd_ones(kinds)
    named = "; ".join(f"process {k} on {found[k][0]!r} has {kinds[k]!r}" for k in wrong)
    usual = next((name for k, name in enumerate(kinds) if k not in wrong), kind)
    kinds_check = Check("device kind", not wrong, named or usual, {"kinds": sorted(set(kinds))})
    numbers = [entry[2] for entry in found]
    odd = odd_ones(numbers)
    ok = not odd and (not count or total == count)
    text = f"{total}" + (f", expected {count}" if count and total != count else "")
    text += "".join(f"; process {k} on {found[k][0]!r} has {numbers[k]}" for k in odd)
    return [kinds_check, Check("devices", ok, text, {"devices": total, "by_process": numbers})]


def odd_ones(values: Sequence[Any]) -> list[int]:
    """Indices of the values that are not the most frequent one (of equally many, the first)."""
    usual = max(values, key=lambda value: (values.count(value), -values.index(value)))
    return [k for k, value in enumerate(values) if value != usual]


def check_data(data: Any) -> Check:
    """The files of the data config: on every host, and the same (name, size, and a hash of both ends of each)."""
    try:
        mine: Any = data_files(data)
        problem = ""
    except UserError as error:
        mine, problem = [], str(error)
    found = distributed.gather([platform.node(), distributed.fingerprint(mine), len(mine), problem])
    for k, (host, _, _, trouble) in enumerate(found):
        if trouble:
            return Check("data", False, f"process {k} on {host!r}: {trouble}")
    odd = odd_ones([entry[1] for entry in found])
    if odd:
        named = ", ".join(f"process {k} on {found[k][0]!r}" for k in odd)
        return Check("data", False, f"the files of {named} are not those of the others")
    size = sum(entry[1] for entry in mine)
    text = f"{len(mine)} files, {size / _MIB:,.1f} MiB, the same on all" if mine else "embedded corpus"
    return Check("data", True, text, {"files": len(mine), "bytes": size})


def data_files(data: Any) -> list[tuple[str, int, str]]:
    """(name, bytes, hash of the first and last MiB) of each file that the data config names; raises UserError."""
    from gpt_jax.data.readers import expand_paths, expand_variables
    from gpt_jax.data.store import MANIFEST, is_store
    from gpt_jax.remote import Remote, is_url

    patterns = [text for text in (data.path, data.valid_path, *(s.get("path", "") for s in data.sources)) if text]
    out = []
    for pattern in patterns:
        if is_url(pattern) and is_store(pattern):
            manifest = Remote(pattern).read(MANIFEST) or b""
            size = sum(entry["size"] for entry in json.loads(manifest)["files"].values())
            out.append((MANIFEST, size, hashlib.sha256(manifest).hexdigest()[:16]))
            continue
        folder = pathlib.Path(expand_variables(pattern))  # a token store
        paths = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else expand_paths(pattern)
        for file in paths:
            size = file.stat().st_size
            with open(file, "rb") as source:
                ends = source.read(_MIB)
                source.seek(max(0, size - _MIB))
                ends += source.read(_MIB)
            out.append((file.name, size, hashlib.sha256(ends).hexdigest()[:16]))
    return out


def check_memory(needed: int) -> Check:
    """Free memory of the devices against what one needs; on CPU that of the host, shared by its devices."""
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
        text += f" (process {where} on {found[where][0]!r}), {needed / 2**30:.2f} GiB needed"
    return Check("memory", least >= needed if needed else None, text, {"free_bytes": least, "needed_bytes": needed})


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


def check_folder(name: str, folder: str, *, shared: bool, size: int = 8 * _MIB) -> Check:
    """Writes to a folder, reads it back, on every process; `shared`: and looks whether all see the same folder."""
    path = pathlib.Path(folder)
    problem, rates = "", [0.0, 0.0]
    try:
        path.mkdir(parents=True, exist_ok=True)
        rates = write_and_read(path, size)
    except OSError as error:
        problem = f"{error.strerror or error}"
    except ValueError as error:
        problem = str(error)
    found = distributed.gather([platform.node(), problem, *rates])
    for k, (host, trouble, _, _) in enumerate(found):
        if trouble:
            return Check(name, False, f"{folder!r} of process {k} on {host!r}: {trouble}")
    try:
        if shared:
            distributed.check_shared(path)
    except UserError as error:
        return Check(name, False, str(error))
    write, read = min(entry[2] for entry in found), min(entry[3] for entry in found)
    return Check(
        name,
        True,
        f"written at {write:,.0f} MiB/s and read at {read:,.0f} MiB/s by the slowest process",
        {"write_mib_per_s": round(write, 1), "read_mib_per_s": round(read, 1)},
    )


def write_and_read(folder: pathlib.Path, size: int) -> list[float]:
    """Returns MiB/s of writing a file and of reading it; raises OSError, or ValueError if it comes back wrong."""
    path, data = folder / f".preflight-{uuid.uuid4().hex}", os.urandom(size)
    try:
        start = time.perf_counter()
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        wrote = time.perf_counter()
        same = path.read_bytes() == data
        done = time.perf_counter()
    finally:
        path.unlink(missing_ok=True)
    if not same:
        raise ValueError("a file came back other than it was written")
    return [size / _MIB / max(wrote - start, 1e-9), size / _MIB / max(done - wrote, 1e-9)]


# ---- devices


def check_matmul() -> Check:
    """The rate of a matrix product on every device, against the published peak and against the others."""
    import jax

    from gpt_jax.throughput import peak_flops

    devices = jax.local_devices()
    on_cpu = devices[0].platform == "cpu"
    mine = [matmul_rate(device, 256 if on_cpu else 8192) for device in devices]
    found = distributed.gather([platform.node(), mine])
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


def check_collectives(sizes: Mapping[str, int]) -> list[Check]:
    """All-reduce and all-gather along every mesh axis: the right numbers, and how fast."""
    from gpt_jax.sharding import make_mesh

    mesh = make_mesh(sizes)
    out = []
    for axis in mesh.axis_names:
        if mesh.shape[axis] > 1:
            out += [measure_collective(mesh, axis, kind) for kind in ("all-reduce", "all-gather")]
    return out


def measure_collective(mesh: Any, axis: str, kind: str, size: int = 0, repeats: int = 5) -> Check:
    """Runs a collective along a mesh axis, every device with its own number, and checks what each one got.

    Args:
      size: bytes per device; 0 is 1 MiB on CPU and 64 MiB elsewhere.

    Returns:
      A Check with the bus bandwidth per device: bytes that a ring sends, 2 (n - 1) / n of the result of an all-reduce
      and (n - 1) / n of an all-gather's, over the best time.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    ways, shape = mesh.shape[axis], tuple(mesh.shape.values())
    size = size or (_MIB if mesh.devices.flat[0].platform == "cpu" else 64 * _MIB)
    spec = PartitionSpec(*mesh.axis_names, None)
    sharding = NamedSharding(mesh, spec)
    numbers = np.arange(mesh.size, dtype=np.float32).reshape(shape)

    def local(index: tuple[slice, ...]) -> np.ndarray:
        return np.broadcast_to(numbers[index[:-1]][..., None], (*(1,) * len(shape), size // 4))

    x = jax.make_array_from_callback((*shape, size // 4), sharding, local)
    along = mesh.axis_names.index(axis)

    def collective(block: jax.Array) -> jax.Array:
        if kind == "all-reduce":
            return jax.lax.psum(block, axis)
        return jnp.sum(jax.lax.all_gather(block, axis), axis=0)  # summed: one expectation serves both

    run = jax.jit(jax.shard_map(collective, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    expected = np.broadcast_to(numbers.sum(along, keepdims=True), shape)
    result = run(x)
    right = all(np.all(np.asarray(s.data) == expected[s.index[:-1]][..., None]) for s in result.addressable_shards)
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        run(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    found = distributed.gather([platform.node(), bool(right), best])
    wrong = [f"process {k} on {host!r}" for k, (host, ok, _) in enumerate(found) if not ok]
    slowest = max(entry[2] for entry in found)
    sent = size * (2 * (ways - 1) / ways if kind == "all-reduce" else (ways - 1))
    rate = sent / slowest / 1e9
    text = f"{rate:.3g} GB/s a device, {ways} devices, {size // _MIB} MiB each"
    if wrong:
        text = f"wrong numbers on {', '.join(wrong)}"
    return Check(f"{kind} {axis}", not wrong, text, {"gb_per_s": round(rate, 4), "bytes": size})


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m gpt_jax.preflight --config=NAME [--workdir=DIR]`, on every host; what `gpt-jax plan --here` calls."""
    import argparse

    from gpt_jax import cluster
    from gpt_jax import config as configs
    from gpt_jax.cli import quieten_libraries, split_overrides

    parser = argparse.ArgumentParser(prog="python -m gpt_jax.preflight", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="", metavar="FILE|NAME", help="the run; --config.KEY=VALUE overrides a key")
    parser.add_argument("--workdir", default="", help="the run's directory")
    parser.add_argument("--seconds", type=float, default=60.0, help="the time there is")
    cluster.add_arguments(parser)
    try:
        rest, overrides = split_overrides(list(sys.argv[1:] if argv is None else argv))
        args = parser.parse_args(rest)
        quieten_libraries()
        config = configs.load(args.config, overrides) if args.config else configs.resolve({}, overrides)
        code = run_preflight(
            config, workdir=args.workdir, seconds=args.seconds, environ=cluster.environment_of(args), log=_print
        )
    except UserError as error:
        print(f"gpt-jax: {error}", file=sys.stderr)
        code = error.exit_code
        return distributed.leave(code)
    return code


def _print(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
