"""Starts the processes of a job on this machine, watches them, and starts the job again when one was lost.

    python -m gpt_jax.launch --processes 4 --restarts 3 -- gpt-jax train --config=quickstart --workdir=runs/q

A process that dies takes the others with it, but the runtime ends those without a word that helps: the launcher sees
which was first, says so in one line and ends the rest. Exit codes: 0 all finished; 75 lost or preempted, run me again;
any other is that of the process that failed by itself, which is never started again (a mistake would only repeat).
Under a scheduler that starts one process per host, `--processes 1` on each host gives the restarts and the log.
SIGTERM lets the processes save and starts none again; SIGQUIT kills them.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from gpt_jax.cluster import COORDINATOR, NUM_PROCESSES, PROCESS_ID
from gpt_jax.errors import UserError
from gpt_jax.remote import refuse_url

RETRY = 75  # EX_TEMPFAIL
_LAST_WORDS = 2.0  # seconds for the output of processes that have ended
_GRACE = 180.0  # seconds to save after SIGTERM


class Job:
    """One attempt: the processes, and the threads that pass their output on.

    Args:
      command: what each process runs. processes: how many; 1 leaves the environment as it is.
      environ: the environment. logs: a folder for the output of each process; None: all of it to this terminal.
    """

    def __init__(
        self, command: Sequence[str], processes: int, environ: Mapping[str, str], logs: pathlib.Path | None = None
    ) -> None:
        self.command, self.logs = list(command), logs
        self.children: list[subprocess.Popen] = []
        self._readers: list[threading.Thread] = []
        self._ended: set[int] = set()
        self._asked: float | None = None  # when they were asked to save
        self._told: set[int] = set()  # those that have ended since, and whose own processes were asked
        address = f"127.0.0.1:{free_port()}"
        for k in range(processes):
            own = dict(environ)
            if processes > 1:
                own |= {COORDINATOR: address, NUM_PROCESSES: str(processes), PROCESS_ID: str(k)}
            self._start(k, own)

    def _start(self, k: int, environ: Mapping[str, str]) -> None:
        log = None
        if self.logs is not None:
            try:
                self.logs.mkdir(parents=True, exist_ok=True)
                log = open(self.logs / f"process_{log_name(environ, k)}.log", "ab")
            except OSError as error:
                self.end()
                raise UserError(f"--logs is {str(self.logs)!r}, which cannot be written: {error.strerror}.") from None
        try:
            child = subprocess.Popen(
                self.command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is ours alone: the processes get SIGTERM and save
            )
        except OSError as error:
            self.end()
            raise UserError(f"cannot start {self.command[0]!r}: {error.strerror}.") from None
        self.children.append(child)
        for source, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
            shown = target if k == 0 or log is None else None
            mark = f"[{k}] " if k else ""
            reader = threading.Thread(target=pass_on, args=(source, shown, log, mark), daemon=True)
            reader.start()
            self._readers.append(reader)

    def fresh_ends(self) -> list[tuple[int, int]]:
        """Returns (process, exit code) of those that have ended since the last call."""
        out = []
        for k, child in enumerate(self.children):
            if k not in self._ended and self._is_over(child):
                self._ended.add(k)
                signal_group(child.pid, signal.SIGKILL)  # what it leaves would run beside the next attempt
                out.append((k, child.returncode))
        return out

    @property
    def running(self) -> int:
        return sum(k not in self._ended and not self._is_over(child) for k, child in enumerate(self.children))

    def _is_over(self, child: subprocess.Popen) -> bool:
        """Whether a process has ended and, when asked to save, also what it has started: a shell does not wait."""
        if child.poll() is None:
            return False
        if self._asked is None or time.monotonic() > self._asked + _GRACE:
            return True
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-child.pid, os.WNOHANG)  # in a container orphans may be this process's own
        number = 0 if child.pid in self._told else signal.SIGTERM  # once
        self._told.add(child.pid)
        return not signal_group(child.pid, number)

    def ask(self) -> None:
        """Asks the processes to save and end."""
        self._asked = time.monotonic()
        for child in self.children:
            child.terminate()

    def kill(self) -> None:
        """Kills what still runs, and what that has started: each process leads a group of its own."""
        for k, child in enumerate(self.children):
            if k not in self._ended:
                signal_group(child.pid, signal.SIGKILL)

    def end(self) -> int:
        """Kills what still runs (what a lost process leaves cannot finish anything); returns how many that were."""
        running = self.running
        self.kill()
        self._ended |= set(range(len(self.children)))
        for child in self.children:
            child.wait()
        end = time.monotonic() + _LAST_WORDS
        for reader in self._readers:
            reader.join(max(0.0, end - time.monotonic()))
        return running


def signal_group(group: int, number: int) -> bool:
    """Signals all processes of a group; returns whether there are any."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # macOS: none but ended ones
        return False
    return True


def pass_on(source: IO[bytes], target: IO[str] | None, log: IO[bytes] | None, mark: str) -> None:
    """Copies lines until the source ends; where one cannot be written it is left out, or its process would wait."""
    for line in source:
        if log is not None:
            with contextlib.suppress(OSError):  # a full disk
                log.write(line)
                log.flush()
        if target is not None and not line.startswith(b"[Gloo] Rank"):  # says only that it works
            with contextlib.suppress(OSError, ValueError):  # nobody reads any more; no such letter in the encoding
                target.write(mark + line.decode(errors="replace"))
                target.flush()


def log_name(environ: Mapping[str, str], k: int) -> str:
    """Which process of the whole job the k-th of this machine is, as far as the environment says."""
    for name in (PROCESS_ID, "SLURM_PROCID", "JOB_COMPLETION_INDEX", "TPU_WORKER_ID"):
        if environ.get(name, "").isdigit():
            return environ[name]
    return str(k)


def free_port() -> int:
    """Returns a port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def was_lost(code: int) -> bool:
    """True for a process that a signal ended (-9, or 137 from a shell): killed, out of memory, aborted."""
    return code < 0 or code > 128


def describe(code: int) -> str:
    """Returns 'killed by SIGKILL' or 'exit code 3'."""
    number = -code if code < 0 else code - 128
    if was_lost(code):
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(number).name}"
    return f"exit code {code}"


def first_cause(ends: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of processes that ended at about the same time, the one that the others followed.

    Nothing but a loss of its own kills a process; one that fails by itself leaves others that the runtime aborts
    (SIGABRT) or that notice and exit with 75.
    """

    def order(end: tuple[int, int]) -> int:
        code = end[1]
        if code in (-signal.SIGABRT, 128 + signal.SIGABRT):
            return 2
        return 3 if code == RETRY else 0 if was_lost(code) else 1

    return min(ends, key=order)


def watch(job: Job, poll: float = 0.05) -> int:
    """Waits for a job; returns 0, 75 or the code of the process that failed. Says which process that was."""
    bad: list[tuple[int, int]] = []
    total = len(job.children)
    codes: dict[int, int] = {}
    while len(codes) < total:
        fresh = job.fresh_ends()
        codes |= dict(fresh)
        bad += [end for end in fresh if end[1] not in (0, RETRY)]
        if bad:
            time.sleep(2 * poll)  # who died with it
            bad += [end for end in job.fresh_ends() if end[1] not in (0, RETRY)]
            k, code = first_cause(bad)
            pid, rest = job.children[k].pid, total - 1 - list(codes.values()).count(0)
            job.end()
            others = f"; the other {rest} ended with it" if rest else ""
            if was_lost(code):
                say(f"process {k} of {total} (pid {pid}) was lost: {describe(code)}{others}.")
                return RETRY
            say(f"process {k} of {total} failed with {describe(code)}{others}.")
            return code
        if RETRY in codes.values() and len(codes) < total:
            # It saved and left, or noticed a loss that we see in a moment; the others follow by themselves or never.
            if not _follow(job, codes, seconds=30.0):
                k = next(k for k, code in codes.items() if code == RETRY)
                rest = job.end()
                say(f"process {k} of {total} left with exit code {RETRY}; ended the other {rest}, which stayed.")
                return RETRY
            continue
        time.sleep(poll)
    job.end()
    return RETRY if RETRY in codes.values() else 0


def _follow(job: Job, codes: Mapping[int, int], seconds: float) -> bool:
    """Waits until another process ends; False if none does in time."""
    end, before = time.monotonic() + seconds, job.running
    while time.monotonic() < end:
        if job.running < before or not before:
            return True
        time.sleep(0.05)
    return False


def launch(
    command: Sequence[str],
    *,
    processes: int = 1,
    restarts: int = 0,
    logs: str | os.PathLike | None = None,
    environ: Mapping[str, str] | None = None,
    pause: float = 1.0,
) -> int:
    """Runs a job, again after each loss or preemption, at most `restarts` times.

    Args:
      command: what each process runs. processes: how many. restarts: how often to start the job again.
      logs: a folder for the output of each process. environ: the environment. pause: seconds before a restart.

    Returns:
      0, 75 (lost or preempted, and no restart left or asked to stop itself) or the code of the process that failed.
    """
    stopping = threading.Event()
    job: Job | None = None

    def stop(number: int, frame: object) -> None:
        stopping.set()
        if job is not None:
            job.kill() if number == signal.SIGQUIT else job.ask()

    main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT) if main_thread else ()
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        for left in range(restarts, -1, -1):
            job = Job(command, processes, dict(os.environ if environ is None else environ), logs and pathlib.Path(logs))
            if stopping.is_set():
                job.ask()  # asked while it was being started
            code = watch(job)
            if code != RETRY or stopping.is_set() or not left:
                return code
            say(f"starting again, {left - 1} restart{'s' * (left != 2)} left.")
            time.sleep(pause)
        return RETRY
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if job is not None:
            job.end()


def hold(path: str | os.PathLike, grace: float = _GRACE) -> IO[str]:
    """Makes this the launcher that holds a file; one that holds it, left by a lost connection, is ended first.

    Two launchers of a host would be two jobs beside each other, and the second finds its port and devices taken.

    Args:
      path: the file, which keeps the number of its holder. grace: seconds to save before its processes are killed.

    Returns:
      The file; it is held until it is closed or this process ends.

    Raises:
      UserError: the file cannot be written, or its holder does not end.
    """
    try:
        file = open(path, "a+")
    except OSError as error:
        raise UserError(f"--alone is {str(path)!r}, which cannot be written: {error.strerror}.") from None
    # With the seconds each is given. A launcher ends with its processes, so the last is for one that is stuck itself.
    steps = [(signal.SIGTERM, grace), (signal.SIGQUIT, 20.0), (signal.SIGKILL, 5.0)]
    end = time.monotonic() + 0.5  # one that holds it since a moment has yet to write its number
    while not _lock(file):
        if time.monotonic() >= end:
            file.seek(0)
            holder = file.read().strip()
            if not steps or not holder.isdigit():
                raise UserError(f"--alone is {str(path)!r}; what holds it ({holder or 'unknown'}) does not end.")
            number, seconds = steps.pop(0)
            say(f"another launcher (pid {holder}) runs here: {number.name}, and up to {seconds:.0f} s for it to end.")
            end = time.monotonic() + seconds
            with contextlib.suppress(OSError):  # it has gone, or is another user's
                os.kill(int(holder), number)
        time.sleep(0.05)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more
        print(f"gpt_jax.launch: {line}", file=sys.stderr, flush=True)


def let_go_of_output() -> None:
    """Drops what cannot be written any more, which the interpreter would try again and end with 120."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gpt_jax.launch", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1, help="processes on this machine")
    parser.add_argument("--restarts", type=int, default=0, help="how often to start again after a loss or preemption")
    parser.add_argument("--logs", default="", metavar="DIR", help="a file per process; the terminal shows process 0")
    parser.add_argument("--alone", default="", metavar="FILE", help="ends the launcher that holds FILE, and holds it")
    parser.add_argument("--cpu-devices", type=int, default=0, help="simulated CPU devices of each process")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    environ = dict(os.environ)
    if args.cpu_devices:
        flags = f"{environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.cpu_devices}"
        environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    try:
        if not command:
            raise UserError("no command: python -m gpt_jax.launch --processes N -- gpt-jax train ....")
        if args.processes < 1 or args.restarts < 0:
            raise UserError(f"--processes is {args.processes}, --restarts {args.restarts}; at least 1 and 0.")
        refuse_url(args.logs, "--logs", "write to a folder, then copy it to the bucket")
        with hold(args.alone) if args.alone else contextlib.nullcontext():
            return launch(
                command, processes=args.processes, restarts=args.restarts, logs=args.logs or None, environ=environ
            )
    except UserError as error:
        say(str(error))
        return 1


if __name__ == "__main__":
    exit_code = main()
    let_go_of_output()
    sys.exit(exit_code)
