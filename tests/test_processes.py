"""Real training runs of two and four processes on CPU, with collectives over gloo."""

import contextlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from gpt_jax.checkpoint import list_steps
from gpt_jax.launch import free_port
from gpt_jax.metrics import read_rows

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETTINGS = {
    "objective": "{'name': 'causal_lm'}",
    "context_length": 16,
    "batch_size": 8,
    "microbatches": 2,
    "model.num_layers": 2,
    "model.d_model": 32,
    "model.num_heads": 2,
    "model.dropout": 0.1,
    "data.tokenizer.kind": "byte",
    "optimizer.schedule": "constant",
    "optimizer.warmup": "4",
    "eval.every_steps": 8,
    "eval.max_batches": 2,
    "checkpoint.every_steps": 4,
    "checkpoint.keep_last": 10,
    "log.tensorboard": False,
    "log.console_every_steps": 4,
    "sample.prompts": "()",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    draw = np.random.default_rng(0)
    words = ["to", "be", "or", "not", "that", "is", "the", "question"]
    for name, lines in (("train", 200), ("valid", 12)):
        content = "\n\n".join(" ".join(draw.choice(words, 12)) for _ in range(lines))
        (folder / f"{name}.txt").write_text(content)
    return folder


def train_command(text, workdir, steps, **settings):
    values = SETTINGS | {"data.path": text / "train.txt", "data.valid_path": text / "valid.txt", "steps": steps}
    overrides = [f"--config.{key}={value}" for key, value in (values | settings).items()]
    return [*CLI, "train", "--config=causal_lm", f"--workdir={workdir}", *overrides]


CLI = [sys.executable, "-m", "gpt_jax.cli"]


def environment(devices):
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }


def launcher(processes, command, devices=1, **options):
    flags = [f"--{name}={value}" for name, value in options.items()]
    start = [sys.executable, "-m", "gpt_jax.launch", f"--processes={processes}", *flags, "--", *map(str, command)]
    return subprocess.Popen(start, env=environment(devices), cwd=ROOT, stdout=-1, stderr=-1, text=True)


def finish(process, code=0, timeout=300):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, f"exit code {process.returncode}\n{out[-2000:]}\n{err[-4000:]}"
    return out, err


def rows_of(workdir):
    rows = read_rows(pathlib.Path(workdir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def assert_close(rows, expected, tolerance=1e-5):
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            np.testing.assert_allclose(row[name], other[name], rtol=tolerance, atol=tolerance, err_msg=name)


def wait_for(condition, process, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


def child(process, index):
    """The process of a launcher with this number."""
    for one in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.Error):
            if one.environ().get("GPT_JAX_PROCESS_ID") == str(index):
                return one
    raise AssertionError(f"no process {index}")


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """One process with four devices."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    finish(launcher(1, train_command(text, workdir, 16), devices=4))
    return rows_of(workdir)


def test_four_processes_have_the_losses_of_one_and_one_restores_what_they_saved(text, tmp_path, alone):
    workdir = tmp_path / "four"
    out, _ = finish(launcher(4, train_command(text, workdir, 12)))
    lines = out.strip().splitlines()
    assert sum("step 00004/00012" in line for line in lines) == 1  # process 0 alone speaks
    assert not [line for line in lines if line.startswith("[")]
    assert json.loads(lines[-1])["step"] == 12
    assert json.loads((workdir / "environment.json").read_text())["devices"]["processes"] == 4
    assert_close(rows_of(workdir)[:11], alone[:11])  # row 12 has the last validation, of the whole split
    assert list_steps(workdir / "checkpoints")[-1] == 12
    finish(launcher(1, train_command(text, workdir, 16), devices=1))
    assert_close(rows_of(workdir)[12:], alone[12:])


def test_a_lost_process_ends_the_job_with_75_and_the_next_start_continues_exactly(text, tmp_path, alone):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(launcher(2, train_command(text, whole, 24), devices=2))
    assert_close(rows_of(whole)[:15], alone[:15])

    process = launcher(2, train_command(text, killed, 24), devices=2)
    wait_for(lambda: 4 in list_steps(killed / "checkpoints"), process)
    victim = child(process, 1)
    victim.kill()
    began = time.monotonic()
    _, err = finish(process, 75)
    assert time.monotonic() - began < 10
    said = [line for line in err.splitlines() if line.startswith("gpt_jax.launch")]
    assert said == [
        f"gpt_jax.launch: process 1 of 2 (pid {victim.pid}) was lost: killed by SIGKILL; the other 1 ended with it."
    ]
    assert 4 <= max(list_steps(killed / "checkpoints")) < 24
    finish(launcher(2, train_command(text, killed, 24), devices=2))
    assert rows_of(killed) == rows_of(whole)  # bitwise


def test_the_launcher_itself_starts_again_after_a_loss(text, tmp_path, alone):
    workdir = tmp_path / "run"
    sampled = {"sample.prompts": "('to be',)", "sample.max_tokens": 4}
    command = train_command(text, workdir, 16, **sampled)
    process = launcher(2, command, devices=2, restarts=2, logs=tmp_path / "logs")
    wait_for(lambda: 4 in list_steps(workdir / "checkpoints"), process)
    child(process, 0).kill()  # the coordinator this time
    _, err = finish(process)
    assert "process 0 of 2" in err and "starting again, 1 restart left." in err
    assert_close(rows_of(workdir), alone)
    assert (tmp_path / "logs" / "process_1.log").exists()
    assert (workdir / "samples" / "step_00000016.txt").read_text().startswith("to be")


def test_sigterm_makes_all_save_the_same_step_and_exit_75(text, tmp_path):
    workdir = tmp_path / "run"
    minutes = {"checkpoint.every_minutes": 1e-3}  # processes' clocks differ, their saves may not
    process = launcher(2, train_command(text, workdir, 100_000, **minutes))
    wait_for(lambda: 4 in list_steps(workdir / "checkpoints"), process)
    process.send_signal(signal.SIGTERM)
    out, _ = finish(process, 75)
    last = json.loads(out.strip().splitlines()[-1])
    assert last["step"] == list_steps(workdir / "checkpoints")[-1] == rows_of(workdir)[-1]["step"]
    events = [json.loads(line)["event"] for line in (workdir / "history.jsonl").read_text().splitlines()]
    assert events == ["start", "preempted"]


def test_without_a_launcher_the_others_end_within_the_heartbeat_timeout(text, tmp_path):
    workdir, address = tmp_path / "run", f"127.0.0.1:{free_port()}"
    flags = ["--coordinator", address, "--num-processes=2", "--config.distributed.heartbeat_seconds=10"]
    command = [*train_command(text, workdir, 100_000), *flags]
    both = [
        subprocess.Popen([*command, f"--process-id={k}"], env=environment(1), cwd=ROOT, stdout=-3, stderr=-3)
        for k in range(2)
    ]
    wait_for(lambda: 4 in list_steps(workdir / "checkpoints"), both[0])
    both[1].kill()
    code = both[0].wait(timeout=30)
    assert code in (75, -signal.SIGABRT)  # told by the collective that broke, or by the runtime


def test_another_config_on_one_process_is_refused_with_its_name(text, tmp_path):
    command = train_command(text, tmp_path / "run", 4)
    script = "exec " + shlex.join(map(str, command)) + " --config.seed=$((GPT_JAX_PROCESS_ID == 2))"
    _, err = finish(launcher(4, ["bash", "-c", script]), 1)
    assert "gpt-jax: the config differs: process 2 on " in err
    assert "failed with exit code 1" in err and "Traceback" not in err


def test_fewer_processes_than_announced_end_in_time_and_are_counted(text, tmp_path):
    own = {"GPT_JAX_COORDINATOR": f"127.0.0.1:{free_port()}", "GPT_JAX_NUM_PROCESSES": "2", "GPT_JAX_PROCESS_ID": "0"}
    done = subprocess.run(
        [*map(str, train_command(text, tmp_path / "run", 4)), "--config.distributed.join_seconds=2"],
        env=environment(1) | own, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 75
    assert done.stderr.strip().splitlines()[-1] == "gpt-jax: 1 of 2 processes came within 2 s; missing: 1."


def test_devices_that_are_not_the_announced_ones_are_refused(text, tmp_path):
    command = train_command(text, tmp_path / "run", 4, **{"distributed.devices": 8})
    _, err = finish(launcher(2, command, devices=2), 75)
    assert "distributed.devices is 8, but there are 4 (2, 2 by process)." in err
    command = train_command(text, tmp_path / "run", 4, **{"distributed.device_kind": "v5p"})
    _, err = finish(launcher(2, command, devices=2), 1)
    assert "distributed.device_kind is 'v5p', but process 0 has 'cpu'." in err


def test_two_processes_evaluate_as_one(text, tmp_path):
    workdir = tmp_path / "run"
    finish(launcher(1, train_command(text, workdir, 4), devices=2))
    found = []
    for processes in (1, 2):
        out, _ = finish(launcher(processes, [*CLI, "eval", f"--workdir={workdir}"], devices=2 // processes))
        found.append(json.loads(out.strip().splitlines()[-1]))
    assert found[0].keys() == found[1].keys()
    assert found[0].pop("workdir") == found[1].pop("workdir")
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_two_processes_score_benchmarks_as_one_and_print_once(text, tmp_path):
    workdir, file = tmp_path / "run", tmp_path / "items.jsonl"
    rows = [{"prompt": "to be or", "choices": ["not", "the", "question"], "answer": i % 3} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    finish(launcher(1, train_command(text, workdir, 4), devices=2))
    found = []
    for processes in (1, 2):
        command = [*CLI, "eval", f"--workdir={workdir}", f"--tasks=choices:{file}"]
        out, _ = finish(launcher(processes, command, devices=2 // processes))
        assert out.count("choices              ") == 1
        found.append(json.loads(out.strip().splitlines()[-1])["tasks"]["choices"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
