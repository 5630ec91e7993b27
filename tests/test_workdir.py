"""workdir.py, files.py: a run directory survives kills and has one user; a run killed anywhere resumes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from gpt_jax import files, workdir
from gpt_jax.cli import main
from gpt_jax.errors import UserError
from gpt_jax.files import atomic_write, clean_leftovers, remove_folder
from gpt_jax.metrics import read_rows
from gpt_jax.workdir import Preemption, open_workdir

CPU = os.environ | {"JAX_PLATFORMS": "cpu"}


def start(code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=CPU, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(code, *arguments):
    process = start(code, *arguments)
    out, err = process.communicate()
    return process.returncode, out, err


# ---- the lock


HOLD = """
    import sys, time
    from gpt_jax.workdir import open_workdir
    with open_workdir(sys.argv[1]):
        print("locked", flush=True)
        time.sleep(60)
"""


def test_a_second_process_is_told_who_uses_the_directory_and_kill_9_frees_it(tmp_path):
    holder = start(HOLD, tmp_path)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} on .*: wait for it") as caught:
        open_workdir(tmp_path).__enter__()
    assert "\n" not in str(caught.value)
    with open_workdir(tmp_path, lock=False) as reader:  # reading beside it is allowed
        assert reader.is_new
    holder.kill()
    holder.communicate()
    with open_workdir(tmp_path):
        pass


def test_a_forked_worker_does_not_keep_the_lock_of_its_killed_parent(tmp_path):
    parent = start(
        """
        import multiprocessing, os, sys, time
        from gpt_jax.workdir import open_workdir
        with open_workdir(sys.argv[1]):
            here, there = multiprocessing.Pipe()
            nap = lambda: (there.send("awake"), time.sleep(60))
            worker = multiprocessing.get_context("fork").Process(target=nap)
            worker.start()
            here.recv()  # it has begun, and left the lock
            print(worker.pid, flush=True)
            time.sleep(60)
        """,
        tmp_path,
    )
    worker = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait()
        os.kill(worker, 0)  # it lives on
        with open_workdir(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        parent.communicate()


def test_the_lock_is_free_again_after_the_block_and_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), open_workdir(tmp_path):
        raise RuntimeError
    for _ in range(2):
        with open_workdir(tmp_path):
            pass


@pytest.mark.parametrize(("make", "message"), [(True, "which is a file"), (False, "no run directory")])
def test_a_workdir_that_cannot_be_opened_is_a_sentence(tmp_path, make, message):
    path = tmp_path / "x"
    if make:
        path.write_text("")
    with pytest.raises(UserError, match=message):
        open_workdir(path, lock=make).__enter__()


@pytest.mark.parametrize("flags", [["train", "--config=quickstart"], ["train"], ["eval"]])
def test_a_workdir_of_too_long_a_name_is_a_sentence(tmp_path, capsys, flags):
    name = str(tmp_path / ("r" * 300))
    assert main([*flags, f"--workdir={name}"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("gpt-jax: ") and err.count("\n") == 1 and name in err and "too long" in err


# ---- files


def test_config_history_and_environment_read_back(tmp_path):
    with open_workdir(tmp_path / "deep" / "run") as run:
        assert run.is_new and run.read_config() is None and run.history() == []
        run.write_config({"steps": 3, "data": {"path": "é"}})
        assert not run.is_new and run.read_config() == {"steps": 3, "data": {"path": "é"}}
        run.add_history("start", 0)
        run.add_history("change", 7, changes={"steps": [3, 5]})
        assert [(e["event"], e["step"]) for e in run.history()] == [("start", 0), ("change", 7)]
        assert run.history()[1]["changes"] == {"steps": [3, 5]}
        environment = run.write_environment({"sha256": "abc"})
    stored = json.loads((tmp_path / "deep" / "run" / "environment.json").read_text())
    assert stored == environment and stored["data"] == {"sha256": "abc"}
    assert stored["packages"]["jax"] and stored["devices"]["platform"] == "cpu"


def test_a_damaged_config_is_named(tmp_path):
    with open_workdir(tmp_path) as run:
        run.config_path.write_text("{half")
        with pytest.raises(UserError, match=r"config.json is damaged"):
            run.read_config()


def test_environment_names_commit_and_keeps_the_uncommitted_diff(tmp_path, monkeypatch):
    package = tmp_path / "repository" / "gpt_jax"
    package.mkdir(parents=True)
    (package / "files.py").write_text("a = 1\n")

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        done = subprocess.run(["git", *identity, *arguments], cwd=package, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "none of the package")
    monkeypatch.setattr(workdir, "__file__", str(package / "workdir.py"))
    assert workdir.code_version() == {}  # the package is not part of the repository
    git("add", ".")
    git("commit", "-q", "-m", "first")
    with open_workdir(tmp_path / "run") as run:
        assert run.write_environment()["code"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
        assert not run.diff_path.exists()
        (package / "files.py").write_text("a = 2\n")
        assert run.write_environment()["code"]["dirty"] is True
        assert "-a = 1\n+a = 2" in run.diff_path.read_text()


def test_tokenizer_is_copied_once_and_travels_with_checkpoints(tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "model").write_bytes(bytes(range(256)))
    with open_workdir(tmp_path / "run") as run:
        run.save_tokenizer(source)
        (source / "model").write_bytes(b"other")
        run.save_tokenizer(source)
        assert (run.tokenizer_path / "model").read_bytes() == bytes(range(256))
        metadata = run.checkpoint_metadata({"steps": (1, 2)})
    assert metadata["config"] == {"steps": [1, 2]} and set(metadata["tokenizer"]) == {"model"}
    import base64

    assert base64.b64decode(metadata["tokenizer"]["model"]) == bytes(range(256))


def test_other_processes_of_a_run_write_nothing(tmp_path):
    run = workdir.Workdir(tmp_path, writes=False)
    run.write_config({})
    run.add_history("start", 0)
    run.write_environment()
    run.write_sample(1, "text")
    assert list(tmp_path.iterdir()) == []


WRITES = """
    import sys
    from gpt_jax.files import atomic_write
    print("ready", flush=True)
    for i in range(10_000_000):
        atomic_write(sys.argv[1], (str(i % 10) * 300_000))
"""


def test_a_killed_writer_leaves_the_old_or_the_new_file_whole(tmp_path):
    path = tmp_path / "file"
    draw = random.Random(0)
    for _ in range(8):
        writer = start(WRITES, path)
        writer.stdout.readline()
        time.sleep(draw.uniform(0.01, 0.2))
        writer.kill()
        writer.communicate()
        text = path.read_text()
        assert len(text) == 300_000 and len(set(text)) == 1
    clean_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_keeps_the_old_file_and_is_a_sentence(tmp_path):
    path = tmp_path / "file"
    _, out, err = run(
        """
        import resource, sys
        from gpt_jax.errors import UserError
        from gpt_jax.files import atomic_write
        atomic_write(sys.argv[1], "old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            atomic_write(sys.argv[1], "x" * 5000)
        except UserError as error:
            print(error)
        """,
        path,
    )
    assert out.startswith("no space left on the device for file at ") and "MiB free" in out, err
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_file_keeps_its_mode(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, "a")
    os.chmod(path, 0o640)
    atomic_write(path, "b")
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_folder_being_removed_never_looks_whole(tmp_path, monkeypatch):
    folder = tmp_path / "400"
    folder.mkdir()
    (folder / "a").write_text("")

    def killed(path, *_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(folder)
    assert [p.name for p in tmp_path.iterdir()] == [".400.deleting"]
    clean_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_errors_that_mean_a_full_disk():
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("wrapped") from error
    except RuntimeError as error:
        assert files.is_no_space(error)
    assert not files.is_no_space(OSError(2, "No such file"))


# ---- being asked to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop_and_the_old_handlers_come_back(number):
    before = signal.getsignal(number)
    with Preemption() as stop:
        assert not stop.requested and not stop.agreed(1)
        os.kill(os.getpid(), number)
        assert stop.requested and stop.agreed(2)
    assert signal.getsignal(number) is before


def test_a_second_interrupt_ends_at_once():
    with pytest.raises(KeyboardInterrupt), Preemption():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


# ---- the pieces together: a loop of counters, killed anywhere

LOOP = """
    import dataclasses, hashlib, random, sys, time
    import jax, jax.numpy as jnp, numpy as np
    from gpt_jax.checkpoint import Checkpointer
    from gpt_jax.metrics import MetricsWriter
    from gpt_jax.workdir import EXIT_PREEMPTED, Preemption, open_workdir

    STEPS = 60
    update = jax.jit(lambda s, b: {"w": s["w"] * 0.9 + b, "step": s["step"] + 1}, donate_argnums=0)

    with open_workdir(sys.argv[1]) as run, Preemption() as stop, Checkpointer(run.checkpoints_path) as saver:
        if run.is_new:
            run.write_config({"steps": STEPS})
        state = {"w": jnp.zeros((50_000,)), "step": jnp.int32(0)}
        start = saver.latest() or 0
        if start:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
            state = saver.restore(start, shapes)
        run.add_history("start", start)
        with MetricsWriter(run.metrics_path, resume_step=start) as writer:
            print("ready", flush=True)
            for step in range(start + 1, STEPS + 1):
                batch = jnp.asarray(np.random.default_rng(step).normal(size=50_000), jnp.float32)
                state = update(state, batch)
                writer.add(step, {"train/loss": float(state["w"].sum()), "perf/now": time.time()})
                z = writer.zscore("train/loss")
                writer.add(step, {"train/loss_z": 0.0 if z is None else z})
                if step % 5 == 0:
                    writer.add(step, {"valid/loss": float((state["w"] ** 2).mean())})
                if step % 4 == 0 or step == STEPS or stop.requested:
                    writer.flush()
                    saver.save(step, state, valid_losses=writer.column("valid/loss"))
                if stop.requested:
                    saver.wait()
                    sys.exit(EXIT_PREEMPTED)
                time.sleep(0.005)
            saver.wait()
        print("kept", saver.all_steps())
"""


def without_perf(path):
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in read_rows(path)]


@pytest.mark.parametrize("most_kills", [4, pytest.param(25, marks=pytest.mark.slow)])
def test_a_loop_killed_at_random_moments_ends_with_the_rows_of_an_uninterrupted_one(tmp_path, most_kills):
    code, _, err = run(LOOP, tmp_path / "straight")
    assert code == 0, err
    expected = without_perf(tmp_path / "straight" / "metrics.jsonl")
    assert [row["step"] for row in expected] == list(range(1, 61))

    draw, codes = random.Random(most_kills), []
    while not codes or codes[-1] != 0:
        process = start(LOOP, tmp_path / "killed")
        process.stdout.readline()
        if len(codes) < most_kills:
            time.sleep(draw.uniform(0.0, 4 / most_kills * 0.3))
            process.send_signal(signal.SIGTERM if len(codes) % 4 == 3 else signal.SIGKILL)
        _, err = process.communicate()
        codes.append(process.returncode)
        assert process.returncode in (0, -signal.SIGKILL, workdir.EXIT_PREEMPTED), err
    assert len(codes) > min(most_kills, 3)
    assert without_perf(tmp_path / "killed" / "metrics.jsonl") == expected
    left = [str(p.name) for p in (tmp_path / "killed").rglob("*")]
    assert not [name for name in left if "tmp" in name or "deleting" in name]
