#!/usr/bin/env python3
"""Prints the manifest of a training job on Kubernetes (GKE): a JobSet of one pod per host, for `kubectl apply -f -`.

    python scripts/jobset.py --name run1 --repo https://example.org/me/gpt_jax --tpu v5p-slice --topology 4x4x4 \\
        --hosts 16 -- gpt-jax train --config=gpt3_1b3 --workdir=/data/runs/run1 | kubectl apply -f -

The pods check out the exact commit (it must be in --repo), install it, and run. A pod that is lost or preempted starts
the whole set again, at most --restarts times; exit code 1, a mistake, ends it at once. JSON, which kubectl reads.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PORT = 8476
# Exit codes of a process's own failure: all but 0, 75 (preempted) and those of signals (128 and more).
_OWN_FAILURES = (1, 2, 3, 126, 127)


def manifest(
    *,
    name: str,
    repo: str,
    commit: str,
    command: Sequence[str],
    hosts: int,
    slices: int = 1,
    tpu: str = "",
    topology: str = "",
    chips: int = 4,
    gpus: int = 0,
    image: str = "python:3.12",
    claim: str = "",
    restarts: int = 3,
) -> dict[str, Any]:
    """Returns the JobSet.

    Args:
      name: of the set. repo, commit: what runs. command: of every process.
      hosts: pods of a slice. slices: replicated jobs. tpu, topology: the node pool's labels; chips: of a host.
      gpus: of a host, instead of a TPU. image: with git and Python (an older Python is replaced).
      claim: a persistent volume claim that all pods mount at /data, where their logs go too; without one they end with
        the pods. restarts: of the whole set.
    """
    checkout = "/tmp/gpt_jax"
    extras = "tpu,gcs" if tpu else "cuda,gcs" if gpus else "gcs"
    setup = (
        f"git clone --quiet --no-checkout {shlex.quote(repo)} {checkout} && git -C {checkout} checkout --quiet {commit}"
    )
    install = f"bash {checkout}/scripts/_host.sh {shlex.quote(repo)} {commit} {checkout} {shlex.quote(extras)}"
    logs = f"--logs /data/logs/{name}/$HOSTNAME " if claim else ""  # a restart has the same names and deletes the pods
    run = f"cd {checkout} && source .venv/bin/activate && exec python -m gpt_jax.launch {logs}-- {shlex.join(command)}"
    environment: list[dict[str, Any]] = []
    if not tpu:  # GKE tells TPU pods their places by itself
        index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
        environment = [
            {"name": "GPT_JAX_COORDINATOR", "value": f"{name}-workers-0-0.{name}:{PORT}"},
            {"name": "GPT_JAX_NUM_PROCESSES", "value": str(hosts)},
            {"name": "GPT_JAX_PROCESS_ID", "valueFrom": index},
        ]
    amount = {"google.com/tpu": str(chips)} if tpu else {"nvidia.com/gpu": str(gpus)} if gpus else {}
    container: dict[str, Any] = {
        "name": "train",
        "image": image,
        "command": ["bash", "-c", f"set -euo pipefail; {setup}; {install}; {run}"],
        "env": environment,
        "ports": [{"containerPort": 8482 if tpu else PORT}],
        "resources": {"limits": amount, "requests": amount},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 180,  # to save after SIGTERM
        "containers": [container],
    }
    if tpu:
        pod["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": tpu,
            "cloud.google.com/gke-tpu-topology": topology,
        }
    if claim:
        container["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
        pod["volumes"] = [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}]
    failures = {
        "action": "FailJob",
        "onExitCodes": {"containerName": "train", "operator": "In", "values": list(_OWN_FAILURES)},
    }
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [failures]},
        "template": {"spec": pod},
    }
    metadata: dict[str, Any] = {"name": name, "labels": {"gpt-jax/commit": commit[:12]}}
    if tpu:
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }  # a slice per job
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": restarts,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "network": {"enableDNSHostnames": True},
            "replicatedJobs": [{"name": "workers", "replicas": slices, "template": {"spec": job}}],
        },
    }


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def uncommitted() -> list[str]:
    """Returns the files whose changes the pods would not check out."""
    new = git("ls-files", "--others", "--exclude-standard", "--", "configs", "gpt_jax")
    return [*git("diff", "--name-only", "HEAD").splitlines(), *new.splitlines()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/jobset.py", description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="of the set: lower-case letters, digits and '-'")
    parser.add_argument("--repo", required=True, help="a repository that the pods can clone")
    parser.add_argument("--commit", default="", help="default: the one checked out here")
    parser.add_argument("--hosts", type=int, required=True, help="pods of a slice, or GPU hosts")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices")
    parser.add_argument("--tpu", default="", help="accelerator of the node pool, e.g. v5p-slice, tpu-v5-lite-podslice")
    parser.add_argument("--topology", default="", help="of a slice, e.g. 4x4x4")
    parser.add_argument("--chips", type=int, default=4, help="TPU chips of a host")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of a host, instead of --tpu")
    parser.add_argument("--image", default="python:3.12", help="with git and Python")
    parser.add_argument("--claim", default="", help="a persistent volume claim, mounted at /data; keeps the logs")
    parser.add_argument("--restarts", type=int, default=3, help="after preemptions and lost pods")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    problem = ""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", args.name):
        problem = f"--name is {args.name!r}; it is lower-case letters, digits and '-', at most 40."
    elif bool(args.tpu) != bool(args.topology):
        problem = "--tpu and --topology go together."
    elif args.tpu and args.gpus:
        problem = "--tpu or --gpus, not both."
    elif args.slices > 1 and not args.tpu:
        problem = "--slices is of TPUs; give --hosts for GPUs."
    elif args.hosts < 1 or args.slices < 1 or args.restarts < 0:
        problem = f"--hosts is {args.hosts}, --slices {args.slices}, --restarts {args.restarts}; at least 1, 1 and 0."
    elif not command:
        problem = "no command: -- gpt-jax train ...."
    elif not args.commit and (changed := uncommitted()):
        problem = f"there are uncommitted changes, which would not run; commit them first: {' '.join(changed)}."
    if problem:
        print(f"jobset: {problem}", file=sys.stderr)
        return 1
    commit = args.commit or git("rev-parse", "HEAD")
    keys = ("name", "repo", "hosts", "slices", "tpu", "topology", "chips", "gpus", "image", "claim", "restarts")
    print(json.dumps(manifest(commit=commit, command=command, **{key: getattr(args, key) for key in keys}), indent=2))
    print(
        f"logs: kubectl logs --prefix --all-containers -l jobset.sigs.k8s.io/jobset-name={args.name}", file=sys.stderr
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
