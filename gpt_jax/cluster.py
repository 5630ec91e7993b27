"""Which process of how many this is, read from the environment: flags, our launcher, SLURM, GKE, Cloud TPU.

Every scheduler says it in its own words; here they become one `Place`, or None where the job has one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import re
import urllib.request
from collections.abc import Callable, Mapping

from gpt_jax.errors import UserError

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "GPT_JAX_COORDINATOR", "GPT_JAX_NUM_PROCESSES", "GPT_JAX_PROCESS_ID"
_TPU_PORT = 8482
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


@dataclasses.dataclass(frozen=True)
class Place:
    """A process of a job.

    Attributes:
      coordinator: 'host:port' of process 0, the same on every process.
      processes, index: how many processes there are and which one this is.
      source: who said so, for messages.
      local_devices: the accelerators of this host that are this process's; None is all of them.
    """

    coordinator: str
    processes: int
    index: int
    source: str
    local_devices: tuple[int, ...] | None = None

    @property
    def host(self) -> str:
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])

    @property
    def is_local(self) -> bool:
        """True if process 0 is reached over the loopback: all processes are on this machine."""
        return self.host in ("localhost", "127.0.0.1", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of commands that may run on several processes; without them the environment is asked."""
    group = parser.add_argument_group("several processes (Cloud TPU, GKE, SLURM and gpt_jax.launch say it themselves)")
    group.add_argument("--coordinator", default="", metavar="HOST:PORT", help=f"of process 0; ${COORDINATOR}")
    group.add_argument("--num-processes", default="", metavar="N", help=f"of the whole job; ${NUM_PROCESSES}")
    group.add_argument("--process-id", default="", metavar="K", help=f"of this process, from 0; ${PROCESS_ID}")


def environment_of(args: argparse.Namespace) -> dict[str, str]:
    """Returns the environment with the flags of `add_arguments`, where given, in place of its variables."""
    given = {COORDINATOR: args.coordinator, NUM_PROCESSES: args.num_processes, PROCESS_ID: args.process_id}
    return dict(os.environ) | {name: value for name, value in given.items() if value}


def read_metadata(key: str) -> str | None:
    """Returns an attribute of a Cloud TPU machine from its metadata server, or None where there is none."""
    request = urllib.request.Request(_METADATA + key, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()
    except (OSError, ValueError):
        return None


def on_tpu_machine(environ: Mapping[str, str]) -> bool:
    """True on a machine with TPU chips that this process may use."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return False
    if importlib.util.find_spec("libtpu") is None:
        return False
    return any(pathlib.Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))


def find_place(
    environ: Mapping[str, str],
    *,
    metadata: Callable[[str], str | None] = read_metadata,
    tpu_machine: bool | None = None,
) -> Place | None:
    """Returns the place of this process in its job; None if the job has one process.

    Args:
      environ: the environment (`environment_of`). Tried in turn: GPT_JAX_*, SLURM (inside srun), TPU (GKE, Cloud TPU).
      metadata: reads an attribute of the machine, where the environment does not say. tpu_machine: None looks.

    Raises:
      UserError: variables that contradict each other or are not numbers.
    """
    for find in (_explicit, _slurm):
        place = find(environ)
        if place is not None:
            return place if place.processes > 1 else None
    if on_tpu_machine(environ) if tpu_machine is None else tpu_machine:
        place = _tpu(environ, metadata)
        return place if place is not None and place.processes > 1 else None
    return None


def _explicit(environ: Mapping[str, str]) -> Place | None:
    given = {name: environ.get(name, "") for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)}
    if not any(given.values()):
        return None
    if _number(given, NUM_PROCESSES, least=1, absent=0) == 1:
        return Place("", 1, 0, NUM_PROCESSES)
    missing = [name for name, value in given.items() if not value]
    if missing:
        there = ", ".join(name for name, value in given.items() if value)
        raise UserError(f"{there} is set but {' and '.join(missing)} is not: several processes need all three.")
    processes, index = _number(given, NUM_PROCESSES, least=1), _number(given, PROCESS_ID, least=0)
    if index >= processes:
        raise UserError(f"{PROCESS_ID} is {index}; of {processes} processes the last is {processes - 1}.")
    found = re.fullmatch(r".+:(\d{1,5})", given[COORDINATOR])
    if not found or not 1 <= int(found[1]) <= 65535:
        raise UserError(
            f"{COORDINATOR} is {given[COORDINATOR]!r}; it is HOST:PORT of process 0, a port from 1 to 65535."
        )
    return Place(given[COORDINATOR], processes, index, NUM_PROCESSES)


def _slurm(environ: Mapping[str, str]) -> Place | None:
    """Inside `srun`: a batch script itself is not a step and stays one process."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if not all(environ.get(name) for name in names):
        return None
    job, nodes = environ[names[0]], environ[names[1]]
    processes, index = _number(environ, names[2], least=1), _number(environ, names[3], least=0)
    port = 61440 + int(re.sub(r"\D", "", job) or 0) % 4096  # one of the high ports, the same on every host of the job
    devices = None
    on_a_node = max(int(n) for n in re.findall(r"(?:^|,)(\d+)", environ.get("SLURM_STEP_TASKS_PER_NODE", "1")))
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    if on_a_node > 1 and (visible.count(",") or not visible):
        devices = (_number(environ, "SLURM_LOCALID", least=0),)
    return Place(f"{first_host(nodes)}:{port}", processes, index, names[2], devices)


def first_host(nodes: str) -> str:
    """Returns the first host of a SLURM node list: 'gpu[07-09,12],login1' -> 'gpu07'."""
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST is {nodes!r}, which names no host.")
    return "".join(part or "" for part in found.groups())


def _tpu(environ: Mapping[str, str], metadata: Callable[[str], str | None]) -> Place | None:
    """Cloud TPU: the hosts of a slice, and which of several slices this is. GKE sets variables, else metadata tell."""
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    worker, slices = environ.get("TPU_WORKER_ID", ""), dict(environ)
    source = "TPU_WORKER_HOSTNAMES"
    if not hosts and "TPU_SKIP_MDS_QUERY" not in environ:
        hosts, worker = metadata("worker-network-endpoints") or "", metadata("agent-worker-number") or ""
        for line in (metadata("tpu-env") or "").splitlines():
            key, _, value = line.partition(":")
            slices.setdefault(key.strip(), value.strip().strip("'"))
        source = "the metadata of this Cloud TPU"
    if not hosts or not worker:
        return None
    names = [entry.split(":")[2] if entry.count(":") == 2 else entry.split(":")[0] for entry in hosts.split(",")]
    count = _number(slices, "MEGASCALE_NUM_SLICES", least=1, absent=1)
    which = _number(slices, "MEGASCALE_SLICE_ID", least=0, absent=0)
    first = (slices.get("MEGASCALE_COORDINATOR_ADDRESS") or names[0]).split(":")[0]
    index = _number({"TPU_WORKER_ID": worker}, "TPU_WORKER_ID", least=0) + which * len(names)
    return Place(f"{first}:{_TPU_PORT}", count * len(names), index, source)


def _number(environ: Mapping[str, str], name: str, *, least: int, absent: int | None = None) -> int:
    text = environ.get(name) or ""
    if not text and absent is not None:
        return absent
    if not text.strip().isdigit() or int(text) < least:
        raise UserError(f"{name} is {text!r}; it is a whole number from {least}.")
    return int(text)
