"""The pre-flight: is everything here that a run needs, on every host, before hours are spent on finding out.

    code = run_preflight(config, workdir="runs/x")          # `gpt-jax plan --here`, one process per host

Every process checks its own part and all hear of all: what is wrong is said once, with the process and the host that
is odd. Under a minute: what does not fit into the time is left out and said so, and what never returns is ended.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt_jax import distributed
from gpt_jax.device_checks import Check, check_collectives, check_matmul, check_memory
from gpt_jax.errors import UserError
from gpt_jax.remote import Remote, has_scheme, is_url, run_folder

_MIB = 1 << 20
_READ = 8 * _MIB  # of an object, to see how fast that goes
LEFT_OUT = 3  # exit code: nothing is wrong as far as was looked, but the time did not suffice for all checks


def run_preflight(
    config: Any,
    *,
    workdir: str = "",
    needed_bytes: int = 0,
    seconds: float = 60.0,
    limit: float = 0.0,
    environ: Mapping[str, str] | None = None,
    log: Callable[[str], None] = print,
) -> int:
    """Checks the devices and hosts at hand; joins the other processes of the job first (`distributed.initialize`).

    Args:
      config: a resolved Config: its mesh, data and `distributed.*` say what is expected.
      workdir: written to and read from, if given. needed_bytes: what a device needs by the plan; 0 asks for the size of
        parameters, gradient and moments alone. seconds: the time there is; no check begins late in it.
      limit: seconds, from when all have joined, after which the process ends in the midst of a check that hangs; 0: 60,
        or `seconds` if that is more.
      environ: where the job is described; None is this process's. log: takes the lines of process 0.

    Returns:
      0 if all is well, 1 if anything is wrong, `LEFT_OUT` if nothing is but checks were left out for want of time: each
      is a line. The last line that process 0 logs is JSON. A process that ends at `limit` does so with 1.

    Raises:
      Unavailable: processes are missing. UserError: code, versions or config differ between processes.
    """
    from gpt_jax import config as configs
    from gpt_jax.compiler_flags import apply_flags

    began = time.monotonic()
    apply_flags(config.compiler.flags, config.compiler.extra)
    place = distributed.initialize(
        environ,
        heartbeat_seconds=config.distributed.heartbeat_seconds,
        join_seconds=min(config.distributed.join_seconds, seconds),
        facts={"the config": distributed.fingerprint(configs.to_dict(config)), "--workdir": workdir},
    )
    index = 0 if place is None else place.index
    say = log if index == 0 else (lambda line: None)  # asks no device, which may hang
    steps = steps_of(config, workdir, needed_bytes)
    at = Progress(list(steps), began)
    left: Sequence[str] = ()
    limit = limit or max(60.0, seconds)
    watchdog = threading.Timer(limit, end_overdue, (at, limit, index, say))
    watchdog.daemon = True
    watchdog.start()
    try:
        for number, (name, step) in enumerate(steps.items()):
            at.now = number
            if distributed.decide(at.seconds > 0.8 * seconds):
                left = at.steps[at.now :]
                at.checks.append(Check("time", None, f"left out after {at.seconds:.0f} s: {', '.join(left)}"))
                say(str(at.checks[-1]))
                break
            try:
                found = step()
            except UserError as error:  # of the config, so the same on all processes: a mesh the devices do not make
                found = [Check(name, False, str(error))]
            for check in found:
                at.checks.append(check)
                say(str(check))
    finally:
        watchdog.cancel()
    result = summary(at.checks, left, at.seconds)
    say(json.dumps(result))
    return 1 if result["wrong"] else LEFT_OUT if left else 0


def steps_of(config: Any, workdir: str, needed_bytes: int) -> dict[str, Callable[[], list[Check]]]:
    """What is checked, by name and in order; see `run_preflight`."""
    from gpt_jax.data.cache import cache_root
    from gpt_jax.run import mesh_of

    return {
        "processes": lambda: [check_processes()],
        "devices": lambda: check_devices(config.distributed.devices, config.distributed.device_kind),
        "data": lambda: [check_data(config.data, parts_of(config.objective))],
        "memory": lambda: [
            check_memory(needed_bytes, "by the plan")
            if needed_bytes
            else check_memory(state_bytes(config), "parameters, gradient and moments alone")
        ],
        "workdir": lambda: [check_folder("workdir", workdir, shared=True)] if workdir else [],
        "cache": lambda: [check_folder("cache", str(cache_root()), shared=False)],
        "matmul": lambda: [check_matmul()],
        "collectives": lambda: check_collectives(mesh_of(config)),
    }


@dataclasses.dataclass
class Progress:
    """How far a pre-flight is: its loop moves it on, its watchdog reads it from a thread of its own.

    Attributes:
      steps: names, in order. began: on the monotonic clock. now: which of them runs. checks: what was found so far.
    """

    steps: Sequence[str]
    began: float
    now: int = 0
    checks: list[Check] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def end_overdue(at: Progress, limit: float, index: int, say: Callable[[str], None]) -> None:
    """Ends the process `index` in the midst of a step that never returns (a collective whose other end is gone, a
    device in use), and names it."""
    where = f"process {index} on {platform.node()!r}"
    check = Check(at.steps[at.now], False, f"not done after {limit:g} s on {where}, which ends")
    print(f"gpt-jax: pre-flight: {check.name}: {check.found}.", file=sys.stderr)
    say(str(check))
    say(json.dumps(summary([*at.checks, check], at.steps[at.now + 1 :], at.seconds)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def summary(checks: Sequence[Check], left: Sequence[str], seconds: float) -> dict[str, Any]:
    """The last line of a pre-flight, for scripts."""
    wrong = [check.name for check in checks if check.ok is False]
    return {
        "ok": not wrong and not left,
        "wrong": wrong,
        "left_out": list(left),
        "checks": {check.name: {"ok": check.ok, "found": check.found, **check.values} for check in checks},
        "seconds": round(seconds, 1),
    }


def state_bytes(config: Any) -> int:
    """Bytes of a device's share of parameters, gradient and Adam's moments; 0 where they are not known."""
    import jax

    from gpt_jax.ahead import vocabulary_of
    from gpt_jax.inherit import following_init
    from gpt_jax.model.size import count_parameters
    from gpt_jax.run import fill_in, mesh_of

    config = following_init(config, lambda line: None)
    try:
        mesh, vocabulary = mesh_of(config).shape, vocabulary_of(config)
    except UserError:  # a mesh that cannot be is told by the collectives; some vocabularies are made with the tokenizer
        return 0
    config = fill_in(config, vocabulary)
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


def parts_of(objective: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The data of the parts of a mixture of objectives, as far as they have their own."""
    parts = objective.get("tasks", {})
    children = parts.values() if isinstance(parts, Mapping) else ()
    return [part.get("data", {}) for part in children if isinstance(part, Mapping)]  # others: the objective's error


def check_data(data: Any, parts: Sequence[Mapping[str, Any]] = ()) -> Check:
    """The files of the data config: on every host, and the same (name, size, and a hash of both ends of each)."""
    rates: list[float] = []
    try:
        mine: Any = data_files(data, parts, rates)
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
    size = sum(entry[1] or 0 for entry in mine)
    text = f"{len(mine)} files, {size / _MIB:,.1f} MiB, the same on all" if mine else "embedded corpus"
    values = {"files": len(mine), "bytes": size}
    unknown = sum(entry[1] is None for entry in mine)
    text += f" ({unknown} of unknown size not counted)" * bool(unknown)
    told = [rate for rate in distributed.gather(min(rates, default=None)) if rate is not None]
    if told:
        rate = min(told)
        text += f"; a store read at {rate:,.0f} MiB/s by the slowest process"
        values["read_mib_per_s"] = round(rate, 1)
    return Check("data", True, text, values)


def data_files(
    data: Any, parts: Sequence[Mapping[str, Any]] = (), rates: list[float] | None = None
) -> list[tuple[str, int | None, str]]:
    """(name, bytes, hash of the first and last MiB) of each file that a run reads; raises UserError.

    Of an object in an object store not more than 8 MiB are read: its size is not known, and the hash is of its end.

    Args:
      data: the data config: its paths, and those of the tasks it names. parts: what an objective's parts set otherwise.
      rates: takes the MiB/s of each read from an object store, short ones left out.
    """
    from gpt_jax.data.readers import expand_paths, expand_variables, refuse_globs
    from gpt_jax.data.store import is_store
    from gpt_jax.tasks.base import task_paths

    named = [data.path, data.valid_path, *(s.get("path", "") for s in data.sources)]
    named += [part.get(key, "") for part in parts for key in ("path", "valid_path")]
    for tasks, split in [
        (data.tasks, data.valid_split),
        *((part.get("tasks", ()), part.get("valid_split", data.valid_split)) for part in parts),
    ]:
        for task in tasks:
            named += task_paths(task, ("train", split))
    expanded = [expand_variables(text) for text in named if text]
    patterns = [part.strip() for text in expanded for part in (text.split(",") if "://" in text else [text])]
    out: list[tuple[str, int | None, str]] = []
    for pattern in dict.fromkeys(patterns):
        if is_url(pattern):
            refuse_globs(pattern)
            entry, rate = look_at_store(pattern) if is_store(pattern) else look_at_object(pattern)
            out.append(entry)
            if rates is not None and rate is not None:
                rates.append(rate)
            continue
        folder = pathlib.Path(pattern)  # a token store
        paths = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else expand_paths(pattern)
        for file in paths:
            size = file.stat().st_size
            with open(file, "rb") as source:
                ends = source.read(_MIB)
                source.seek(max(0, size - _MIB))
                ends += source.read(_MIB)
            out.append((file.name, size, hashlib.sha256(ends).hexdigest()[:16]))
    return out


def look_at_store(url: str) -> tuple[tuple[str, int, str], float | None]:
    """Returns ((name, bytes, hash) of a token store's manifest, MiB/s of a read of its tokens, None of a short one)."""
    from gpt_jax.data.store import MANIFEST

    remote = Remote(url)
    manifest = remote.read(MANIFEST) or b""
    try:
        sizes = {name: entry["size"] for name, entry in json.loads(manifest)["files"].items()}
        name = max(sizes, key=sizes.get)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"the token store at {url!r} is damaged: {MANIFEST} does not name its files.") from None
    start = time.perf_counter()
    data = remote.read(name, 0, min(sizes[name], _READ))
    seconds = time.perf_counter() - start
    if data is None:
        raise UserError(f"the token store at {url!r} is damaged: {name} is missing.")
    return (MANIFEST, sum(sizes.values()), hashlib.sha256(manifest).hexdigest()[:16]), _rate_if_long(data, seconds)


def look_at_object(url: str) -> tuple[tuple[str, int | None, str], float | None]:
    """Returns ((name, bytes if they are few, hash of the end) of an object, MiB/s of the read, None of a short one)."""
    folder, _, name = url.rpartition("/")
    remote = Remote(folder)
    start = time.perf_counter()
    data = remote.read_end(name, _READ)
    seconds = time.perf_counter() - start
    if data is None:
        raise UserError(f"data path {url!r}: no such object.")
    size = len(data) if len(data) < _READ else None
    return (name, size, hashlib.sha256(data).hexdigest()[:16]), _rate_if_long(data, seconds)


def _rate_if_long(data: bytes, seconds: float) -> float | None:
    return _rate(len(data), seconds) if len(data) == _READ else None  # of a short read it would be the latency


def _rate(size: int, seconds: float) -> float:
    return size / _MIB / max(seconds, 1e-9)


def check_folder(name: str, folder: str, *, shared: bool, size: int = _READ) -> Check:
    """Writes to a folder, reads it back, on every process; `shared`: and looks whether all see the same folder."""
    problem, rates = "", [0.0, 0.0]
    try:
        rates = write_and_read(folder, size)
    except OSError as error:
        problem = f"{error.strerror or error}"
    except (ValueError, UserError) as error:
        problem = str(error)
    found = distributed.gather([platform.node(), problem, *rates])
    for k, (host, trouble, _, _) in enumerate(found):
        if trouble:
            return Check(name, False, f"{folder!r} of process {k} on {host!r}: {trouble}")
    try:
        if shared and not has_scheme(folder):
            distributed.check_shared(folder)
    except UserError as error:
        return Check(name, False, str(error))
    write, read = min(entry[2] for entry in found), min(entry[3] for entry in found)
    return Check(
        name,
        True,
        f"written at {write:,.0f} MiB/s and read at {read:,.0f} MiB/s by the slowest process",
        {"write_mib_per_s": round(write, 1), "read_mib_per_s": round(read, 1)},
    )


def write_and_read(folder: str, size: int) -> list[float]:
    """Returns MiB/s of writing to a folder or gs:// URL and of reading it.

    Raises:
      OSError, UserError: it cannot be written. ValueError: what came back is other than what was written.
    """
    name, data = f".preflight-{uuid.uuid4().hex}", os.urandom(size)
    if has_scheme(folder):
        run_folder(folder, "--workdir")
        store = Remote(folder)
        write, read, remove = (functools.partial(do, name) for do in (store.write, store.read, store.delete))
    else:
        path = pathlib.Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write, read = functools.partial(_write_through, path), path.read_bytes
        remove = functools.partial(path.unlink, missing_ok=True)
    try:
        start = time.perf_counter()
        write(data)
        wrote = time.perf_counter()
        same = read() == data
        done = time.perf_counter()
    finally:
        remove()
    if not same:
        raise ValueError("a file came back other than it was written")
    return [_rate(size, wrote - start), _rate(size, done - wrote)]


def _write_through(path: pathlib.Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m gpt_jax.preflight FLAGS` is `gpt-jax plan --here FLAGS`."""
    from gpt_jax.cli import main as command

    return command(["plan", "--here", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
