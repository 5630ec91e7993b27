"""The roll call before a job of several processes starts: who is there, and do all have the same code and config.

The runtime's own start would end every process with an abort if one does not come. So the processes meet first at the
coordinator's port: each says in a line of JSON who it is and what it runs, process 0 answers all with one verdict.
The port is then free for the runtime. Nothing but JSON is read, and no more than a bounded line of it.
"""

from __future__ import annotations

import contextlib
import json
import platform
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.cluster import Place
from gpt_jax.errors import Unavailable, UserError

_LONGEST = 1 << 16
_SLACK = 10.0  # seconds beyond the deadline that a process waits for process 0's verdict


def call_roll(place: Place, facts: Mapping[str, Any], seconds: float) -> None:
    """Waits until all processes of the job are there and agree.

    Args:
      place: of this process. facts: what must be equal everywhere, JSON values by name.
      seconds: how long to wait for the others.

    Raises:
      Unavailable: not all came in time (how many did is said), or process 0 cannot be reached.
      UserError: two claim the same place, or facts differ (the odd process is named).
    """
    mine = {"process": place.index, "processes": place.processes, "host": platform.node(), "facts": dict(facts)}
    verdict = _lead(place, mine, seconds) if place.index == 0 else _answer(place, mine, seconds)
    if verdict:
        raise (Unavailable if verdict["again"] else UserError)(verdict["error"])


def _lead(place: Place, mine: dict[str, Any], seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    present, lines = {0: mine}, []
    verdict: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(place))
        while len(present) < place.processes and not verdict:
            left = deadline - time.monotonic()
            if left <= 0:
                verdict = {"error": _absent(present, place.processes, seconds), "again": True}
                break
            server.settimeout(left)
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            stack.enter_context(connection)
            theirs = _read(connection, min(left, 5.0))
            if theirs is None or type(theirs.get("process")) is not int:  # not one of us
                connection.close()
                continue
            lines.append(connection)
            verdict = _misplaced(theirs, present, place.processes)
            present.setdefault(theirs["process"], theirs)
        verdict = verdict or differing([present[k] for k in sorted(present)])
        for connection in lines:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(verdict).encode() + b"\n")
        for connection in lines:  # the other end closes first, so that the port is free at once
            with contextlib.suppress(OSError):
                connection.settimeout(2.0)
                connection.recv(1)
    return verdict


def _answer(place: Place, mine: dict[str, Any], seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((place.host, place.port), timeout=5.0)
        except OSError:
            time.sleep(0.1)
            continue
        with connection:
            try:
                connection.sendall(json.dumps(mine).encode() + b"\n")
                verdict = _read(connection, deadline - time.monotonic() + _SLACK)
            except OSError:
                verdict = None
        if verdict is not None:
            return verdict
        time.sleep(0.1)  # another job's process 0, or ours that has just ended
    here = f"process {place.index} of {place.processes} ({place.source})"
    return {"error": f"{here} could not reach process 0 at {place.coordinator} within {seconds:g} s.", "again": True}


def _listen(place: Place) -> socket.socket:
    try:
        if place.is_local:
            return socket.create_server((place.host if ":" not in place.host else "127.0.0.1", place.port))
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", place.port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", place.port))
    except OSError as error:
        raise Unavailable(f"process 0 cannot listen on port {place.port} ({error.strerror}).") from None


def _read(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """A line of JSON, or None if what comes is none, too long or too slow."""
    connection.settimeout(max(seconds, 0.1))
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < _LONGEST:
            piece = connection.recv(4096)
            if not piece:
                break
            line += piece
        value = json.loads(line)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _absent(present: Mapping[int, Any], processes: int, seconds: float) -> str:
    missing = [k for k in range(processes) if k not in present]
    shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return f"{len(present)} of {processes} processes came within {seconds:g} s; missing: {shown}."


def _misplaced(theirs: Mapping[str, Any], present: Mapping[int, Any], processes: int) -> dict[str, Any]:
    index, host = theirs.get("process"), theirs.get("host")
    if theirs.get("processes") != processes:
        error = f"{host!r} was told of {theirs.get('processes')} processes, process 0 of {processes}."
    elif index in present:
        error = f"two processes say that they are process {index}: on {present[index]['host']!r} and {host!r}."
    else:
        return {}
    return {"error": error, "again": False}


def differing(roll: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns {} if the facts of all are equal, else the verdict that names the fact and the odd processes.

    The value of most counts as right; of equally many, process 0's.
    """
    facts = [entry.get("facts") if isinstance(entry.get("facts"), Mapping) else {} for entry in roll]
    for name in dict.fromkeys(name for entry in facts for name in entry):
        values = [json.dumps(entry.get(name), sort_keys=True) for entry in facts]
        counts = Counter(values)
        most = max(counts.values())
        right = next(value for value in values if counts[value] == most)
        odd = [k for k, value in enumerate(values) if value != right]
        if odd:
            shown = ", ".join(f"process {roll[k]['process']} on {roll[k]['host']!r} has {values[k]}" for k in odd[:4])
            more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
            return {"error": f"{name} differs: {shown}{more}, the others have {right}.", "again": False}
    return {}
