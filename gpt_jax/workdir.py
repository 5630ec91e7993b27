"""The run directory: what a run leaves on disk, its lock, and how it is asked to stop.

    workdir/config.json        the resolved config          metrics.jsonl    a row per step
            environment.json   code, versions, devices      tensorboard/     events
            code.diff          uncommitted changes          checkpoints/     see checkpoint.py
            history.jsonl      starts, changes, with step   tokenizer/       its files
            samples/           texts                        spikes/          see forensics/spikes.py
            evaluation.json    the last validation          baselines.json   xz, unigrams on the same text
            memory.json        parameters and bytes         report.md        see report.py (loss.png, report.html)

Files are replaced whole (files.py), so a kill at any moment leaves each readable.

A run directory may be a gs:// URL. Its checkpoints then lie only there; the other files are written to a copy in the
cache, which begins with what is there and is sent there before each checkpoint and at the end, so that a run goes on
from any machine. The lock is that copy's: it keeps out other processes of this host, not other hosts.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from gpt_jax.data.cache import cache_root, content_hash, locked
from gpt_jax.errors import Unavailable, UserError
from gpt_jax.files import atomic_write, clean_leftovers, explain_no_space, fsync_folder
from gpt_jax.remote import Remote, download, has_scheme, run_folder, upload

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: 'restart me'

_PACKAGES = (
    *("gpt_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "ml_collections"),
    *("numpy", "sentencepiece", "tokenizers", "tensorboardX", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
)
_COPIED = (  # in this order: when the config is there, so is the history of its changes
    *("environment.json", "history.jsonl", "metrics.jsonl", "evaluation.json", "baselines.json", "memory.json"),
    *("code.diff", "report.md", "report.html", "loss.png", "wandb_id"),
    *("samples", "spikes", "profile", "tensorboard", "tokenizer", "config.json"),
)
_READ = ("config.json", "environment.json", "metrics.jsonl")  # what is read of a run that another process may write
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "GLIBC_TUNABLES", "OMP_NUM_THREADS")


class Workdir:
    """Names, reads and writes the files of one run directory. Get one with `open_workdir`.

    Of several processes only the first writes: on the others the writing methods do nothing.

    Args:
      path: the directory, or the copy of what is small in the one at `url`.
    """

    def __init__(self, path: str | os.PathLike, writes: bool = True, url: str = "") -> None:
        self.path = pathlib.Path(path)
        self.url = url
        self.writes = writes
        self._sent: dict[str, dict[str, tuple[int, int]]] = {}
        self.config_path = self.path / "config.json"
        self.environment_path = self.path / "environment.json"
        self.diff_path = self.path / "code.diff"
        self.history_path = self.path / "history.jsonl"
        self.metrics_path = self.path / "metrics.jsonl"
        self.tensorboard_path = self.path / "tensorboard"
        self.checkpoints_path = (run_folder(url, "--workdir") if url else self.path) / "checkpoints"
        self.tokenizer_path = self.path / "tokenizer"
        self.samples_path = self.path / "samples"
        self.report_path = self.path / "report.md"

    @property
    def is_new(self) -> bool:
        """True until the run's config has been written."""
        return not self.config_path.exists()

    def read_config(self) -> dict[str, Any] | None:
        """Returns the resolved config as nested dicts, or None in a new run directory."""
        return self.read_json("config.json")

    def write_config(self, tree: Mapping[str, Any]) -> None:
        self.write_json("config.json", tree)

    def read_json(self, name: str) -> Any | None:
        """Returns the JSON file `name` of the run, or None if it has none; raises UserError if it is damaged."""
        path = self.path / name
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): restore it or delete it.") from None

    def write_json(self, name: str, tree: Any) -> None:
        self._write(self.path / name, json.dumps(tree, indent=2) + "\n")

    def write_environment(self, data_fingerprint: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Writes environment.json (and code.diff if the code has uncommitted changes); returns what it wrote."""
        environment = describe_environment()
        if data_fingerprint is not None:
            environment["data"] = dict(data_fingerprint)
        if environment["code"].get("dirty"):
            self._write(self.diff_path, _git("diff", "HEAD", "--", "."))
        elif self.writes:
            self.diff_path.unlink(missing_ok=True)
        self.write_json("environment.json", environment)
        return environment

    def add_history(self, event: str, step: int, **fields: Any) -> None:
        """Adds a line to history.jsonl: what happened ('start', 'resume', 'change', ...) and at which step."""
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, "step": int(step), **fields})
        before = "".join(json.dumps(entry) + "\n" for entry in self.history())
        self._write(self.history_path, before + line + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Returns the lines of history.jsonl, oldest first."""
        if not self.history_path.exists():
            return []
        return [json.loads(line) for line in self.history_path.read_text().splitlines() if line.strip()]

    def save_tokenizer(self, folder: str | os.PathLike) -> None:
        """Copies a tokenizer's files into the run, once."""
        if self.tokenizer_path.exists() or not self.writes:
            return
        temporary = self.path / ".tokenizer.deleting"
        shutil.rmtree(temporary, ignore_errors=True)
        with explain_no_space(self.tokenizer_path, "the tokenizer"):
            shutil.copytree(folder, temporary)
            os.replace(temporary, self.tokenizer_path)
            fsync_folder(self.path)

    @property
    def name(self) -> str:
        """What the user calls it: its path or URL."""
        return self.url or str(self.path)

    def copy_to(self, url: str) -> list[str]:
        """Copies what is small and has changed since (config, logs, report, samples) to an object store; returns names.

        Raises:
          UserError: the store cannot be reached.
        """
        if not url or not self.writes:
            return []
        return upload(self.path, _COPIED, Remote(url), self._sent.setdefault(url, {}))

    def publish(self) -> None:
        """Sends a gs:// run directory's small files there; of one on a file system they are there already."""
        self.copy_to(self.url)

    def write_sample(self, step: int, text: str) -> pathlib.Path:
        """Writes the texts sampled at a step; returns the file."""
        path = self.samples_path / f"step_{step:08d}.txt"
        if self.writes:
            self.samples_path.mkdir(exist_ok=True)
        self._write(path, text)
        return path

    def checkpoint_metadata(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what a checkpoint carries beside its arrays, so that it can be read without its run directory.

        Keys: `config` (resolved), `code` (see `code_version`), `tokenizer` ({file name: base64 of its bytes}).
        """
        files = sorted(p for p in self.tokenizer_path.glob("**/*") if p.is_file())
        tokenizer = {str(p.relative_to(self.tokenizer_path)): base64.b64encode(p.read_bytes()).decode() for p in files}
        return {"config": json.loads(json.dumps(config)), "code": code_version(), "tokenizer": tokenizer}

    def _write(self, path: pathlib.Path, text: str) -> None:
        if self.writes:
            atomic_write(path, text)


@contextlib.contextmanager
def open_workdir(path: str | os.PathLike, lock: bool = True) -> Iterator[Workdir]:
    """Opens a run directory, made if there is none, and keeps other processes out of it while the block runs.

    Args:
      path: the directory, or a gs:// URL.
      lock: False only reads: no lock, nothing created (`eval` and `sample` beside a running training). Of several
        processes the first takes the lock for all.

    Raises:
      UserError: in use by another process (named by its id), not a directory, not writable, or absent (lock=False).
    """
    if has_scheme(path):
        with _open_url(str(path).rstrip("/"), lock) as workdir:
            yield workdir
        return
    if lock and jax.process_index() > 0:
        yield Workdir(path, writes=False)
        return
    workdir = Workdir(path, writes=lock)
    if not lock:
        if not workdir.path.is_dir():
            raise UserError(f"no run directory {str(path)!r}.")
        yield workdir
        return
    try:
        workdir.path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--workdir is {str(path)!r}, which is a file or lies below one; give a folder.") from None
    except PermissionError:
        raise UserError(f"--workdir is {str(path)!r}, which may not be created: permission denied.") from None
    except OSError as error:
        raise UserError(f"--workdir is {str(path)!r}, which cannot be created: {error.strerror or error}.") from None
    with _locked(workdir.path, workdir.name):
        clean_leftovers(workdir.path)
        yield workdir


@contextlib.contextmanager
def _open_url(url: str, lock: bool) -> Iterator[Workdir]:
    run_folder(url, "--workdir")  # refuses other stores
    if not lock:
        yield Workdir(_copy_to_read(url), writes=False, url=url)
        return
    first = jax.process_index() == 0
    folder = cache_root() / "runs" / f"{content_hash(url)}-process-{jax.process_index()}"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, url) if first else contextlib.nullcontext():
        if first:
            clean_leftovers(folder)
        download(url, _COPIED if first else (*_READ, "tokenizer"), folder)
        yield Workdir(folder, writes=first, url=url)


def _copy_to_read(url: str) -> pathlib.Path:
    """Returns a folder with a run's files as they are at gs:// now; raises UserError if there is no run."""
    folder = cache_root() / "runs" / f"{content_hash(url)}-read"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if "config.json" not in download(url, _READ, folder):
            raise UserError(f"no run directory {url!r}: it has no config.json.")
    return folder


class _Lock:
    """An flock on a file: the kernel drops it with the process that holds it, however that one ends."""

    def __init__(self, path: pathlib.Path) -> None:
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        # A forked worker inherits the descriptor, and with it the lock, which must not outlive this process.
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: reference() and reference().close())

    def take(self, owner: str) -> str | None:
        """Takes the lock and returns None, or returns who has it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.pread(self._file, 1000, 0).decode(errors="replace").strip() or "another process"
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, owner.encode(), 0)
        return None

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None


@contextlib.contextmanager
def _locked(folder: pathlib.Path, name: str) -> Iterator[None]:
    try:
        lock = _Lock(folder / ".lock")
    except PermissionError:
        raise UserError(f"the run directory {name!r} is not writable.") from None
    try:
        holder = lock.take(f"process {os.getpid()} on {platform.node()}")
        if holder:
            raise UserError(
                f"the run directory {name!r} is in use by {holder}: wait for it, end it, or give another --workdir."
            )
        yield
    finally:
        lock.close()


def describe_environment() -> dict[str, Any]:
    """Returns what a result depends on besides config and data: code, versions, devices, variables."""
    devices = jax.devices()
    return {
        "code": code_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "command": sys.argv,
        "packages": installed_versions(_PACKAGES),
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
            "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "variables": {k: v for k, v in sorted(os.environ.items()) if k in _VARIABLES or k.startswith("JAX_")},
    }


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns {package: version} of those that are installed."""
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def code_version() -> dict[str, Any]:
    """Returns {'commit', 'dirty'} of the checkout that this package runs from; {} outside a git checkout."""
    try:
        _git("ls-files", "--error-unmatch", "files.py")  # not a venv that lies inside someone's repository
        commit = _git("rev-parse", "HEAD").strip()
        return {
            "commit": commit,
            "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".").strip()),
        }
    except (OSError, subprocess.CalledProcessError):
        return {}


def _git(*arguments: str) -> str:
    folder = pathlib.Path(__file__).resolve().parent
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, errors="replace"
    ).stdout


class _Stopped(KeyboardInterrupt):
    """SIGTERM: like Ctrl-C, nothing on its way that handles errors takes it for one."""


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """While there is nothing to save yet, SIGTERM ends the block at once, with EXIT_PREEMPTED too.

    With several processes jax's own notice of it is left in place, as by `Preemption`.
    """
    if jax.process_count() > 1:
        yield
        return
    process = os.getpid()

    def stop(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a fork
            os._exit(128 + number)
        raise _Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Stopped:
        raise Unavailable("asked to stop when there was nothing to save: run the same command again.") from None
    finally:
        signal.signal(signal.SIGTERM, before)


class Preemption:
    """While active, SIGTERM and SIGINT ask the run to stop after the step it is in, instead of ending it.

    The loop reads `requested` between steps, saves, and exits with EXIT_PREEMPTED. A second SIGINT interrupts at once.
    With several processes jax's own notice of SIGTERM is left in place (`jax.distributed.initialize` installs it),
    and `agreed` becomes true on all of them at the same step.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        for number in (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ():
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def agreed(self, step: int) -> bool:
        """Returns whether to stop after `step`: the same answer on every process."""
        if jax.process_count() == 1:
            return self.requested
        from jax.experimental import multihost_utils

        self.requested = self.requested or bool(multihost_utils.reached_preemption_sync_point(step))
        return self.requested
