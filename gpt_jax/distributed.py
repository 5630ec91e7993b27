"""Several processes: they join before anything touches a device, agree, and end together.

    place = initialize(environment_of(args), heartbeat_seconds=60, join_seconds=300, facts=...)

One process: nothing happens and everything below answers for itself. Process 0 alone writes (see workdir.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import platform
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from gpt_jax.cluster import Place, find_place
from gpt_jax.errors import Unavailable, UserError
from gpt_jax.rollcall import call_roll, differing

HEARTBEAT = "GPT_JAX_HEARTBEAT_SECONDS"
JOIN = "GPT_JAX_JOIN_SECONDS"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "libtpu", "jax-cuda12-plugin")

# What the runtime says on the others when one process is gone.
_LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Connection refused", "Socket closed"),
    *("heartbeat", "another task died", "gloo", "coordination service", "UNAVAILABLE:", "Broken pipe"),
    *("nccl", "megascale", "DEADLINE_EXCEEDED"),
)


def initialize(
    environ: Mapping[str, str] | None = None,
    *,
    heartbeat_seconds: float = 60,
    join_seconds: float = 300,
    facts: Mapping[str, Any] | None = None,
) -> Place | None:
    """Joins this process to its job, if it belongs to one: before anything touches a device.

    Args:
      environ: the environment that says so (`cluster.find_place`); None is this process's.
      heartbeat_seconds: a process that was silent for so long is lost, and the others end. GPT_JAX_HEARTBEAT_SECONDS
        takes its place. join_seconds: how long to wait for all to come; GPT_JAX_JOIN_SECONDS takes its place.
      facts: what must be equal on all processes, JSON values by name; versions and code are compared anyway.

    Returns:
      The place of this process; None if it is alone.

    Raises:
      Unavailable: fewer processes came than were announced. UserError: they do not run the same.
    """
    environ = os.environ if environ is None else environ
    place = find_place(environ)
    if place is None:
        return None
    heartbeat = _seconds(environ, HEARTBEAT, heartbeat_seconds)
    join = _seconds(environ, JOIN, join_seconds)
    call_roll(place, versions() | dict(facts or {}), join)

    import jax

    if jax.distributed.is_initialized():
        raise UserError("this process has joined a job already.")
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.index,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, int(join)),
        heartbeat_timeout_seconds=max(1, int(heartbeat)),
        shutdown_timeout_seconds=max(1, int(heartbeat)),
        coordinator_bind_address=f"127.0.0.1:{place.port}" if place.is_local else None,
    )
    return place


def versions() -> dict[str, Any]:
    """Returns what must be equal everywhere whatever the job: the code and the versions of the libraries."""
    from gpt_jax.workdir import code_version, installed_versions

    found = installed_versions(_PACKAGES)
    return {"the code": code_version() | {"files": source_hash()}, "Python": platform.python_version()} | {
        f"the version of {name}": found.get(name) for name in _PACKAGES
    }


def source_hash(folder: pathlib.Path | None = None) -> str:
    """Returns 16 hex digits of the package's source, uncommitted changes included."""
    folder = folder or pathlib.Path(__file__).resolve().parent
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def fingerprint(value: Any) -> str:
    """Returns 16 hex digits of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def several() -> bool:
    """True if this process has joined others (asks no device, and imports nothing for it)."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def is_first() -> bool:
    """True on the one process that prints and writes."""
    return not several() or sys.modules["jax"].process_index() == 0


def said_once(log: Callable[[str], None]) -> Callable[[str], None]:
    """Returns `log` on process 0 and silence on the others."""
    return log if is_first() else (lambda line: None)


def decide(value: bool) -> bool:
    """Returns process 0's answer on every process; all must ask. Waits for the slowest: not for every step."""
    return gather(value)[0]


def gather(value: Any, hours: float = 24.0) -> list[Any]:
    """Returns the JSON value of every process, by process, on every process; all must ask, in the same order.

    Through the job's coordination service and not the devices, whose number may differ (that is one thing to find out),
    and whose collectives give up after a while: processes that build data or reports may be minutes apart. Ends with an
    error, or by the runtime's abort, if one of them is lost.
    """
    if not several():
        return [value]
    from jax._src import distributed  # jax has no public name for the client of its coordination service

    state = distributed.global_state
    number = state.client.key_value_increment(f"gpt_jax/gathered/{state.process_id}", 1)
    place = f"gpt_jax/gather/{number}"
    state.client.key_value_set(f"{place}/{state.process_id}", json.dumps(value))
    state.client.wait_at_barrier(place, int(hours * 3_600_000))
    found = {int(key.rpartition("/")[2]): json.loads(text) for key, text in state.client.key_value_dir_get(f"{place}/")}
    if state.process_id == 0:  # all have read the one before
        state.client.key_value_delete(f"gpt_jax/gather/{number - 1}/")
    return [found[process] for process in range(state.num_processes)]


def check_equal(**facts: Any) -> None:
    """Raises UserError, on every process, naming the first fact that is not equal on all and the odd process."""
    if not several():
        return
    roll = [
        {"process": k, "host": host, "facts": theirs}
        for k, (host, theirs) in enumerate(gather([platform.node(), facts]))
    ]
    verdict = differing(roll)
    if verdict:
        raise UserError(verdict["error"])


def check_devices(count: int, kind: str) -> None:
    """Raises UserError if the job's devices are not the announced ones, naming the odd process (0, '': whatever)."""
    import jax

    devices = jax.devices()
    if count and len(devices) != count:
        by_process = [sum(d.process_index == k for d in devices) for k in range(jax.process_count())]
        raise Unavailable(
            f"distributed.devices is {count}, but there are {len(devices)} "
            f"({', '.join(map(str, by_process))} by process)."
        )
    for device in devices:
        if kind and kind.lower() not in device.device_kind.lower():
            raise UserError(
                f"distributed.device_kind is {kind!r}, but process {device.process_index} has {device.device_kind!r}."
            )


def check_shared(folder: str | os.PathLike, seconds: float = 10.0) -> None:
    """Raises UserError, on every process, if `folder` is not the same folder on all hosts, naming the odd process."""
    if not several():
        return
    path = pathlib.Path(folder) / ".shared"
    token = gather(uuid.uuid4().hex)[0]
    if is_first():
        path.write_text(token)
    gather(None)
    end, seen = time.monotonic() + seconds, False
    while not seen and time.monotonic() < end:
        with contextlib.suppress(OSError):
            seen = path.read_text() == token
        if not seen:
            time.sleep(0.2)  # a network file system may show a new file late
    found = gather([platform.node(), seen])
    if is_first():
        path.unlink(missing_ok=True)
    for k, (host, there) in enumerate(found):
        if not there:
            raise UserError(
                f"the folder {str(folder)!r} of process {k} on {host!r} is not that of process 0 on {found[0][0]!r}: "
                "several hosts need one they share."
            )


def is_lost(error: BaseException) -> bool:
    """Tells whether an error of this process comes of another one's end."""
    return any(text.lower() in str(error).lower() for text in _LOST)


def leave(code: int) -> int:
    """Returns `code`, unless others may still be at work: a failing process ends at once, and does not wait for them.

    The orderly end waits until all have come to it, which those never do that wait for this one.
    """
    if code in (0, 75) or not several():
        return code
    _end(code)


def leave_if_several(error: BaseException) -> None:
    """Ends this process on an unexpected error if others may wait for it; alone, it does nothing.

    With 75, 'run me again', and one line if the error comes of another process's end; else with 1 and the traceback.
    """
    if not several():
        return
    if is_lost(error):
        reason = " ".join(str(error).split())[:200]
        print(f"gpt-jax: process {os.getpid()} on {platform.node()!r} lost another one ({reason}).", file=sys.stderr)
        _end(Unavailable.exit_code)
    traceback.print_exception(error)
    _end(1)


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _seconds(environ: Mapping[str, str], name: str, otherwise: float) -> float:
    text = environ.get(name, "")
    try:
        value = float(text) if text else float(otherwise)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise UserError(f"{name} is {text!r}; it is a number of seconds above 0.")
    return value
