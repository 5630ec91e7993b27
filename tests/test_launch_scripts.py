"""The launchers for Cloud TPU, SLURM and GKE: dry runs, and real runs against stand-ins for gcloud and srun."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from helpers import load_script

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMAND = ["--", "gpt-jax", "train", "--config=gpt3 1b3", "--workdir=/mnt/r"]
TPU = ["--name", "run1", "--zone", "z-a", "--type", "v5p-256"]


def tool(folder, name, script):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """A clean git checkout with the scripts."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "setup.cfg").write_text("")
    git(root, "init", "-q")
    commit(root)
    return root


def git(root, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(
        ["git", *identity, "-C", str(root), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def commit(root):
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "state")
    return git(root, "rev-parse", "HEAD")


def run(command, tools=None, **variables):
    environment = os.environ | {"LC_ALL": "C"} | variables
    if tools is not None:
        environment["PATH"] = f"{tools}:{environment['PATH']}"
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (extra `test`)")
def test_shellcheck_finds_nothing_in_the_scripts():
    scripts = sorted((ROOT / "scripts").glob("*.sh"))
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_documented_commands_run(checkout):
    page = (ROOT / "docs" / "pods_launch.md").read_text()
    (block,) = re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S)
    commands = block.replace("\\\n", " ").splitlines()
    assert len(commands) == 3
    for command in commands:
        done = subprocess.run(["bash", "-c", command], cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0 and len(done.stdout) > 500, done.stderr


# ---- Cloud TPU


def test_a_dry_run_for_a_tpu_pod_says_every_command_and_runs_none(checkout, tmp_path):
    tool(tmp_path / "bin", "gcloud", "echo ran >&2; exit 1")
    done = run(
        ["bash", checkout / "scripts/launch_tpu_pod.sh", *TPU, "--spot", "--dry-run", *COMMAND], tmp_path / "bin"
    )
    assert done.returncode == 0 and "ran" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("+ ") for line in lines)
    assert (
        "+ gcloud compute tpus queued-resources create run1 --node-id run1 --accelerator-type v5p-256 "
        "--runtime-version v2-alpha-tpuv5 --spot --zone z-a --quiet" in lines
    )
    bundle = next(line for line in lines if "git bundle create" in line)
    shipped = next(line for line in lines if "_host.sh" in line and "scp" not in line)
    assert bundle.endswith(" HEAD") and git(checkout, "rev-parse", "HEAD") in shipped and "--worker=all" in shipped
    train = next(line for line in lines if "gpt_jax.launch" in line)
    assert "gpt3" in train and "1b3" in train and "--worker=all" in train
    assert "--alone" in train  # what a lost connection left behind does not run beside it


GCLOUD = """
echo "$*" >> "$CALLS"
case "$*" in
  *"queued-resources describe"*)
    case "$(head -n 1 "$STATES")" in
      ERROR*) head -n 1 "$STATES" >&2; sed -i 1d "$STATES"; exit 1 ;;
    esac
    head -n 1 "$STATES"; sed -i 1d "$STATES"
    [ -s "$STATES" ] || echo ACTIVE > "$STATES" ;;
  *"tpu-vm describe"*) echo 2 ;;
  *"$REFUSED"*) exit 1 ;;
  *"gpt_jax.launch"*)
    head -n 1 "$ENDS" | tr ' ' '\\n' | while read -r c; do echo "exit code $c of h"; done
    sed -i 1d "$ENDS" ;;
esac
"""


def on_tpu(checkout, tmp_path, ends, states="ACTIVE", more=(), refused="nothing"):
    """Runs the launcher; `ends` has a line per attempt: the exit codes of its hosts. What has `refused` in it fails."""
    tool(tmp_path / "bin", "gcloud", GCLOUD)
    tool(tmp_path / "bin", "sleep", "true")
    (tmp_path / "ends").write_text(ends)
    (tmp_path / "states").write_text(states + "\n")
    (tmp_path / "calls").write_text("")
    done = run(
        ["bash", checkout / "scripts/launch_tpu_pod.sh", *TPU, *more, *COMMAND],
        tmp_path / "bin",
        CALLS=str(tmp_path / "calls"),
        STATES=str(tmp_path / "states"),
        ENDS=str(tmp_path / "ends"),
        REFUSED=refused,
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    return done, calls, sum("gpt_jax.launch" in call for call in calls)


def test_a_finished_run_ends_with_0_and_every_hosts_log_is_fetched(checkout, tmp_path):
    done, calls, attempts = on_tpu(checkout, tmp_path, "0 0\n")
    assert (done.returncode, attempts) == (0, 1), done.stderr
    fetched = [call for call in calls if "run1:gpt_jax_logs" in call]
    assert [("--worker=0" in call, "--worker=1" in call) for call in fetched] == [(True, False), (False, True)]
    assert (checkout / "runs/logs/run1/host_1").is_dir()
    assert not any(" create " in call for call in calls)


def test_a_preemption_starts_again_and_a_mistake_does_not(checkout, tmp_path):
    done, _, attempts = on_tpu(checkout, tmp_path, "75 134\n75 75\n0 0\n")
    assert (done.returncode, attempts) == (0, 3)
    done, _, attempts = on_tpu(checkout, tmp_path, "1 134\n0 0\n")
    assert (done.returncode, attempts) == (1, 1) and "failed by itself" in done.stderr
    done, _, attempts = on_tpu(checkout, tmp_path, "75 75\n" * 9, more=["--restarts", "2"])
    assert (done.returncode, attempts) == (75, 3)
    done, _, attempts = on_tpu(checkout, tmp_path, "\n0 0\n")  # the slice was gone: no host said anything
    assert (done.returncode, attempts) == (0, 2)


def test_a_slice_that_was_taken_away_is_made_anew(checkout, tmp_path):
    _, calls, _ = on_tpu(checkout, tmp_path, "0\n", states="SUSPENDED\nNONE\nPROVISIONING\nACTIVE")
    made = [call.split()[3] for call in calls if "queued-resources" in call and "describe" not in call]
    assert made == ["delete", "create"]


@pytest.mark.parametrize("refused", ["tpu-vm scp /", "bash _host.sh"])
def test_hosts_that_cannot_be_made_ready_are_a_failure_and_no_preemption(checkout, tmp_path, refused):
    done, _, attempts = on_tpu(checkout, tmp_path, "0 0\n", refused=refused)
    assert (done.returncode, attempts) == (1, 0) and "could not be made ready" in done.stderr
    states = "ACTIVE\nSUSPENDED"  # taken away while it was made ready
    done, _, _ = on_tpu(checkout, tmp_path, "0 0\n", states, ["--restarts", "0"], refused)
    assert done.returncode == 75 and "could not be made ready" not in done.stderr


def test_a_slice_that_fails_again_and_again_is_given_up(checkout, tmp_path):
    for state, code in (("FAILED", 1), ("SUSPENDED", 75)):
        states = f"{state}\nNONE\n" * 9
        done, calls, attempts = on_tpu(checkout, tmp_path, "0 0\n", states, ["--restarts", "2"])
        made = [call for call in calls if "queued-resources create" in call]
        assert (done.returncode, attempts, len(made)) == (code, 0, 3), done.stderr
        assert f"run1 is {state} again" in done.stderr


def test_a_slice_whose_state_cannot_be_asked_is_not_made_anew(checkout, tmp_path):
    states = "ERROR: UNAVAILABLE: try again\nERROR: UNAVAILABLE: try again\nACTIVE"
    done, calls, attempts = on_tpu(checkout, tmp_path, "0 0\n", states)
    assert (done.returncode, attempts) == (0, 1) and not any(" create " in call for call in calls)
    done, calls, attempts = on_tpu(checkout, tmp_path, "0 0\n", "ERROR: PERMISSION_DENIED: no\n" * 9)
    assert (done.returncode, attempts) == (1, 0) and "cannot be asked: ERROR: PERMISSION_DENIED: no" in done.stderr
    missing = "ERROR: (gcloud) NOT_FOUND: Resource 'projects/p' was not found\nACTIVE"
    done, calls, attempts = on_tpu(checkout, tmp_path, "0 0\n", missing)
    assert (done.returncode, attempts) == (0, 1) and any(" create " in call for call in calls)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TPU], "no command"),
        (["--name", "x", *COMMAND], "--name, --zone and --type are needed"),
        ([*TPU, "--zoen", "x", *COMMAND], "unknown option --zoen"),
        ([*TPU, "--restarts", "many", *COMMAND], "--restarts is 'many'"),
    ],
)
def test_mistakes_on_the_command_line_of_the_pod_launcher(checkout, arguments, message):
    done = run(["bash", checkout / "scripts/launch_tpu_pod.sh", "--dry-run", *arguments])
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1] and not done.stdout


@pytest.mark.parametrize("path", ["setup.cfg", "configs/new.py", "gpt_jax/a/new.py"])
def test_uncommitted_changes_are_not_left_behind_silently(checkout, tmp_path, path):
    (checkout / path).parent.mkdir(parents=True, exist_ok=True)
    (checkout / path).write_text("changed")
    jobset = [sys.executable, "scripts/jobset.py", "--name", "a", "--repo", "r", "--hosts", "1"]
    for command in (["bash", "scripts/launch_tpu_pod.sh", *TPU], ["bash", "scripts/launch_slurm.sh"], jobset):
        done = run([command[0], checkout / command[1], *command[2:], *COMMAND])
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and "uncommitted changes" in line and line.endswith(f": {path}.")


# ---- SLURM


SRUN = """
echo "$*" > "$SAW"
while [[ "$1" == --* ]]; do shift; done
worst=0 k=0
for code in $ENDS; do
  SLURM_PROCID=$k CODE=$code "$@" || { [ $? -gt $worst ] && worst=$code; }
  k=$((k + 1))
done
exit $worst
"""


def in_slurm(checkout, tmp_path, ends, restarted=0, requeue=0):
    """Runs the batch script that the launcher prints; `ends` are the exit codes of its tasks, `requeue` scontrol's."""
    tools = tmp_path / "bin"
    tool(tools, "srun", SRUN)
    tool(tools, "scontrol", f"echo $* > {tmp_path}/scontrol; exit {requeue}")
    command = ["bash", checkout / "scripts/launch_slurm.sh", "--nodes", "2", "--restarts", "3", "--dry-run"]
    made = run([*command, "--", "bash", "-c", "exit $CODE"])
    assert made.returncode == 0, made.stderr
    (tmp_path / "job.sh").write_text(made.stdout[made.stdout.index("#!") :])
    (tmp_path / "scontrol").unlink(missing_ok=True)
    shutil.rmtree(checkout / "runs", ignore_errors=True)
    shutil.copytree(checkout / "scripts", checkout / "runs/code" / git(checkout, "rev-parse", "HEAD") / "scripts")
    done = run(
        ["bash", tmp_path / "job.sh"], tools, SAW=str(tmp_path / "saw"), ENDS=ends, SLURM_JOB_ID="7",
        SLURM_RESTART_COUNT=str(restarted), PYTHONPATH=str(ROOT),
    )  # fmt: skip
    again = (tmp_path / "scontrol").read_text().strip() if (tmp_path / "scontrol").exists() else ""
    return done.returncode, again


def test_the_batch_script_for_slurm(checkout, tmp_path):
    tool(tmp_path / "bin", "sbatch", "echo submitted >&2; exit 1")
    done = run(
        ["bash", checkout / "scripts/launch_slurm.sh", "--nodes", "4", "--partition", "gpu", "--dry-run", *COMMAND],
        tmp_path / "bin",
    )
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    whole_nodes = ("--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--exclusive", "--mem=0")
    for wanted in (*whole_nodes, "--partition=gpu", "--requeue"):
        assert f"#SBATCH {wanted}" in lines
    assert git(checkout, "rev-parse", "HEAD") in lines[0]
    assert "gpt3\\ 1b3" in done.stdout
    if shutil.which("shellcheck"):
        (tmp_path / "job.sh").write_text(done.stdout[done.stdout.index("#!") :])
        assert run(["shellcheck", tmp_path / "job.sh"]).returncode == 0


def test_a_job_of_slurm_runs_in_the_copy_of_the_commit_and_finds_what_is_beside_it(checkout):
    """As the checkout may have changed when the job starts, and again when it starts again."""
    (checkout / "data").mkdir()
    (checkout / "data/own.txt").write_text("x")
    given = ["gpt-jax", "data", "--workdir=out/r", "--workdir", "r", "--a=data/own.txt", "--b", "data", "--c=scripts"]
    kept = ["--d=setup.cfg", "--e=runs/to_come", "--f=/data/own.txt", "--g=gs://b/data", "--h=7", "--i='data'"]
    done = run(["bash", checkout / "scripts/launch_slurm.sh", "--dry-run", "--", *given, *kept])
    assert done.returncode == 0 and not done.stderr
    copy = f"{checkout}/runs/code/{git(checkout, 'rev-parse', 'HEAD')}"
    lines = done.stdout.splitlines()
    assert f"+ ln -sfn {checkout}/runs {copy}/runs" in lines and f'cd "{copy}" || exit 1' in lines
    command = shlex.split(next(line for line in lines if "_slurm_task.sh" in line))
    assert command[:3] == ["bash", f"{copy}/scripts/_slurm_task.sh", "$ends"]
    beside = [f"--workdir={checkout}/out/r", "--workdir", f"{checkout}/r", f"--a={checkout}/data/own.txt"]
    assert command[3:] == ["gpt-jax", "data", *beside, "--b", f"{checkout}/data", "--c=scripts", *kept]


def test_globs_and_lists_of_files_beside_the_commit_are_told_from_the_root_too(checkout):
    (checkout / "data/deep/er").mkdir(parents=True)
    for name in ("data/one.txt", "data/two.txt", "data/deep/er/three.txt", "scripts/own.sh"):
        (checkout / name).write_text("x")
    here = f"{checkout}/data"
    given = {
        "data/*.txt": "data/*.txt",  # of no flag
        "--a=data/*.txt": f"--a={here}/*.txt",
        "--b=data/**/three.txt": f"--b={here}/**/three.txt",
        "--c=data/one.txt,data/t?o.txt": f"--c={here}/one.txt,{here}/t?o.txt",
        "--d=data/one.txt, gs://b/data/*.txt,/data/one.txt, data/two.txt,": f"--d={here}/one.txt, gs://b/data/*.txt,"
        f"/data/one.txt, {here}/two.txt,",
        "--e=scripts/*.sh,setup.cfg": f"--e={checkout}/scripts/*.sh,setup.cfg",  # one is not the commit's
        "--f=scripts/*.py,set*.cfg": "--f=scripts/*.py,set*.cfg",
        "--g=data/*.jsonl,a b,('data/one.txt','x')": "--g=data/*.jsonl,a b,('data/one.txt','x')",
        "--workdir=a,b": f"--workdir={checkout}/a,b",
    }
    done = run(["bash", checkout / "scripts/launch_slurm.sh", "--dry-run", "--", "gpt-jax", *given])
    assert done.returncode == 0 and not done.stderr
    command = shlex.split(next(line for line in done.stdout.splitlines() if "_slurm_task.sh" in line))
    assert command[4:] == list(given.values())


def test_slurm_queues_a_lost_job_again_and_never_a_mistake(checkout, tmp_path):
    assert in_slurm(checkout, tmp_path, "0 0") == (0, "")
    assert "--kill-on-bad-exit=1" in (tmp_path / "saw").read_text()
    assert in_slurm(checkout, tmp_path, "75 75") == (0, "requeue 7")
    assert in_slurm(checkout, tmp_path, "137 134") == (0, "requeue 7")
    assert in_slurm(checkout, tmp_path, "1 137") == (1, "")  # srun says 137, the process itself 1
    assert in_slurm(checkout, tmp_path, "75 75", restarted=3) == (75, "")
    assert in_slurm(checkout, tmp_path, "75 75", requeue=1) == (75, "requeue 7")  # which was refused


def test_a_task_of_slurm_passes_sigterm_on_and_waits_until_all_is_saved(tmp_path):
    saves = (
        f"import pathlib, signal, sys, time; here = pathlib.Path({str(tmp_path)!r}); "
        "signal.signal(signal.SIGTERM, lambda *_: time.sleep(0.5) or (here / 'saved').touch() or sys.exit(75)); "
        "(here / 'ready').touch(); time.sleep(600)"
    )
    command = ["bash", str(ROOT / "scripts/_slurm_task.sh"), str(tmp_path), sys.executable, "-c", saves]
    environment = os.environ | {"SLURM_PROCID": "5", "PYTHONPATH": str(ROOT)}
    task = subprocess.Popen(command, env=environment)
    while not (tmp_path / "ready").exists():
        assert task.poll() is None
        time.sleep(0.05)
    task.terminate()
    time.sleep(0.2)
    task.terminate()  # as at the end of the time limit, while it saves
    assert task.wait(timeout=30) == 75 and (tmp_path / "saved").exists()
    assert (tmp_path / "5").read_text() == "75\n"


# ---- every host


def host_script(root):
    (root / "scripts/_venv.sh").write_text(
        'ensure_venv() { mkdir -p .venv/bin; ln -sf "${PYTHON:-none}" .venv/bin/python; echo "extras $1"; }\n'
    )
    return commit(root)


def test_a_host_gets_exactly_the_commit(checkout, tmp_path):
    first = host_script(checkout)
    tool(tmp_path / "bin", "python3", f'exec {sys.executable} "$@"')
    (checkout / "later").write_text("x")
    second = commit(checkout)
    git(checkout, "bundle", "create", "-q", str(tmp_path / "b"), "HEAD")
    for wanted in (first, second, first):
        command = ["bash", checkout / "scripts/_host.sh", tmp_path / "b", wanted, tmp_path / "there", "tpu"]
        done = run(command, tmp_path / "bin", PYTHON="")
        assert done.returncode == 0, done.stderr
        assert "extras tpu" in done.stdout and git(tmp_path / "there", "rev-parse", "HEAD") == wanted
    assert not (tmp_path / "there" / "later").exists()


def test_a_host_that_has_a_checkout_takes_a_new_commit_from_a_bundle_beside_it(checkout, tmp_path):
    host_script(checkout)
    tool(tmp_path / "bin", "python3", f'exec {sys.executable} "$@"')
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(checkout / "scripts/_host.sh", home)
    for name in ("one.bundle", "two.bundle"):
        (checkout / "setup.cfg").write_text(name)
        wanted = commit(checkout)
        git(checkout, "bundle", "create", "-q", str(home / name), "HEAD")
        environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHON": ""}
        command = ["bash", "_host.sh", name, wanted, "gpt_jax", "tpu"]  # as the launcher says it
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert git(home / "gpt_jax", "rev-parse", "HEAD") == wanted


def test_a_python_that_is_too_old_is_replaced(checkout, tmp_path):
    wanted = host_script(checkout)
    git(checkout, "bundle", "create", "-q", str(tmp_path / "b"), "HEAD")
    old = f"""
    echo "$*" >> {tmp_path}/asked
    case "$*" in
      --version) echo Python 3.8.10 ;;
      *"python find"*) echo {sys.executable} ;;
      -c*) exit 1 ;;
    esac"""
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        tool(tmp_path / "bin", name, old)
    command = ["bash", checkout / "scripts/_host.sh", tmp_path / "b", wanted, tmp_path / "there", ""]
    done = run(command, tmp_path / "bin", PYTHON="")
    assert done.returncode == 0, done.stderr
    assert "Python 3.8.10 is too old, installing 3.12" in done.stdout
    asked = (tmp_path / "asked").read_text()
    assert "-m pip install --user --quiet uv" in asked and "-m uv python install --quiet 3.12" in asked
    assert os.path.realpath(tmp_path / "there/.venv/bin/python") == os.path.realpath(sys.executable)


# ---- GKE


@pytest.fixture(scope="module")
def jobset():
    return load_script("jobset")


# The parts of JobSet v1alpha2, batch/v1 Job and core/v1 Pod that the manifest uses: required keys and types.
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "containers": [
        {
            "name": str,
            "image": str,
            "command": [str],
            "env": [{"name": str}],
            "ports": [{"containerPort": int}],
            "resources": {"limits": {}, "requests": {}},
        }
    ],
}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": str,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [{"action": str, "onExitCodes": {"containerName": str, "operator": str, "values": [int]}}]
    },
    "template": {"spec": POD},
}
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "labels": {}},
    "spec": {
        "failurePolicy": {"maxRestarts": int, "rules": [{"action": str, "onJobFailureReasons": [str]}]},
        "network": {"enableDNSHostnames": bool},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def check(value, schema, where="manifest"):
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        for key, inner in schema.items():
            assert key in value, f"{where}.{key}"
            check(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for item in value:
            check(item, schema[0], f"{where}[]")
    else:
        assert type(value) is schema, where


def made(jobset, capsys, *flags):
    code = jobset.main(["--name", "run1", "--repo", "https://example.org/r", "--commit", "abc123", *flags, *COMMAND])
    said = capsys.readouterr()
    assert code == 0, said.err
    tree = json.loads(said.out)
    check(tree, JOBSET)
    return tree, tree["spec"]["replicatedJobs"][0], said.err


def test_a_jobset_for_tpu_slices(jobset, capsys):
    flags = ["--tpu", "v5p-slice", "--topology", "4x4x4", "--hosts", "16", "--slices", "2", "--restarts", "5"]
    tree, jobs, err = made(jobset, capsys, *flags)
    assert tree["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and tree["spec"]["failurePolicy"]["maxRestarts"] == 5
    job = jobs["template"]["spec"]
    assert (jobs["replicas"], job["parallelism"], job["completions"]) == (2, 16, 16)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"} and not pod["containers"][0]["env"]
    script = pod["containers"][0]["command"][2]
    assert "checkout --quiet abc123" in script and "gpt_jax.launch -- gpt-jax train '--config=gpt3 1b3'" in script
    assert run(["bash", "-n", "-c", script]).returncode == 0
    assert "kubectl logs" in err


def test_a_mistake_ends_a_jobset_and_a_lost_pod_starts_it_again(jobset, capsys):
    tree, jobs, _ = made(jobset, capsys, "--gpus", "8", "--hosts", "4")
    (rule,) = jobs["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and 1 in rule["onExitCodes"]["values"]
    assert not {0, 75, 134, 137, 143} & set(rule["onExitCodes"]["values"])
    assert tree["spec"]["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]


def test_pods_with_gpus_are_told_their_places(jobset, capsys):
    from gpt_jax.cluster import find_place

    _, jobs, _ = made(jobset, capsys, "--gpus", "8", "--hosts", "4", "--claim", "disk")
    pod = jobs["template"]["spec"]["template"]["spec"]
    environ = {entry["name"]: entry.get("value", "3") for entry in pod["containers"][0]["env"]}
    place = find_place(environ)
    assert (place.coordinator, place.processes, place.index) == ("run1-workers-0-0.run1:8476", 4, 3)
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "disk"
    script = pod["containers"][0]["command"][2]
    assert " gpt_jax.launch --logs /data/logs/run1/$HOSTNAME -- gpt-jax train " in script  # a restart deletes the pods


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--name", "Run"], "--name is 'Run'"),
        (["--tpu", "v5p-slice"], "--tpu and --topology go together"),
        (["--gpus", "8", "--tpu", "x", "--topology", "2x2"], "not both"),
        (["--slices", "2"], "--slices is of TPUs"),
        (["--hosts", "0"], "--hosts is 0"),
    ],
)
def test_mistakes_on_the_command_line_of_the_jobset(jobset, capsys, flags, message):
    base = ["--name", "a", "--repo", "r", "--hosts", "1"]
    assert jobset.main([*base, *flags, *COMMAND]) == 1
    assert message in capsys.readouterr().err
