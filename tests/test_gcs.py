"""Runs at gs://: trained, continued elsewhere, killed and read, on a server that speaks Cloud Storage's API."""

import json
import os
import subprocess
import sys

import pytest
from fake_gcs import FakeGcs

RUN = "gs://bucket/runs/a"
OPTIONS = ("--config=causal_lm", "--config.steps=8", "--config.checkpoint.every_steps=4", "--config.eval.every_steps=4")
TINY = (
    "--config.batch_size=8",
    "--config.context_length=16",
    "--config.model.num_layers=1",
    "--config.model.d_model=16",
)
TINY += ("--config.model.num_heads=1", "--config.eval.max_batches=1", "--config.data.path=text.txt")
TINY += ("--config.data.tokenizer.kind=byte", "--config.sample.prompts=('a',)", "--config.sample.max_tokens=4")


@pytest.fixture
def server():
    server = FakeGcs()
    yield server
    server.close()


@pytest.fixture
def gpt_jax(server, tmp_path):
    """Runs a command on a machine of that name, which has a cache of its own; returns the finished process.

    With `processes` it is launched as so many, of one device each.
    """
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)

    def run(*command, host="one", code=0, processes=0):
        env = os.environ | server.environment | {"GPT_JAX_CACHE": str(tmp_path / host), "JAX_PLATFORMS": "cpu"}
        start = [sys.executable, "-m", "gpt_jax.cli", *command]
        if processes:
            start = [sys.executable, "-m", "gpt_jax.launch", f"--processes={processes}", "--", *start]
            env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
        done = subprocess.run(
            start,
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, done.stderr[-3000:]
        return done

    return run


def rows(text):
    """The rows of a metrics file without what depends on the clock."""
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in found]


@pytest.mark.slow
def test_a_run_goes_on_from_another_machine_and_is_read_there(server, gpt_jax, tmp_path):
    for steps in (4, 8):
        gpt_jax("train", *OPTIONS, *TINY, "--workdir=local", f"--config.steps={steps}", "--accept-changes")
    gpt_jax("train", *OPTIONS, *TINY, f"--workdir={RUN}", "--config.steps=4")
    assert "runs/a/checkpoints/4/commit_success.txt" in server.names("bucket")
    done = gpt_jax("train", *OPTIONS, *TINY, f"--workdir={RUN}", "--accept-changes", host="two")
    assert "continuing at step 4 of 8" in done.stdout + done.stderr
    data, _ = server.objects["bucket", "runs/a/metrics.jsonl"]
    here = rows((tmp_path / "local" / "metrics.jsonl").read_text())
    there = rows(data.decode())
    assert [row["step"] for row in there] == [row["step"] for row in here]
    assert [row.get("train/loss") for row in there] == [row.get("train/loss") for row in here]
    names = {name.removeprefix("runs/a/").split("/")[0] for name in server.names("bucket")}
    assert {"config.json", "history.jsonl", "report.md", "report.html", "tokenizer", "samples"} <= names
    found = json.loads(gpt_jax("eval", f"--workdir={RUN}", host="three").stdout.splitlines()[-1])
    assert found["step"] == 8 and found["workdir"] == RUN
    said = gpt_jax("sample", f"--workdir={RUN}", "--prompt=to be", "--max-tokens=4", "--json", host="three").stdout
    assert json.loads(said.splitlines()[-1])["step"] == 8
    started = (f"--config.init.from={RUN}", "--config.steps=1", "--config.model.d_model=32")
    said = gpt_jax("train", *OPTIONS, *TINY, "--workdir=other", *started, host="three").stdout
    assert f"model of {RUN}, whose weights the run starts from: " in said and "d_model=16" in said
    assert f"tokenizer of {RUN}" in said and "initialised 0" in said
    gpt_jax("eval", "--workdir=other", host="four")  # whose tokenizer is that of the run at gs://
    gpt_jax("plan", "--here", *OPTIONS, *TINY, f"--workdir={RUN}", host="three")
    assert not any(".preflight" in name for name in server.names("bucket"))
    assert not (tmp_path / "gs:").exists()


@pytest.mark.slow
def test_two_processes_write_a_run_that_one_goes_on_with(server, gpt_jax):
    gpt_jax("train", *OPTIONS, *TINY, f"--workdir={RUN}", processes=2)
    names = server.names("bucket")
    for part in (0, 1):  # each wrote its own
        assert any(f"/checkpoints/8/state/ocdbt.process_{part}/d/" in name for name in names)
    found = json.loads(gpt_jax("eval", f"--workdir={RUN}", host="two").stdout.splitlines()[-1])
    assert found["step"] == 8
    done = gpt_jax("train", *OPTIONS, *TINY, f"--workdir={RUN}", "--config.steps=9", "--accept-changes", host="two")
    assert "continuing at step 8 of 9" in done.stdout + done.stderr


@pytest.mark.slow
def test_what_a_killed_save_left_is_no_checkpoint(server, gpt_jax):
    gpt_jax(
        "train",
        *OPTIONS,
        *TINY,
        f"--workdir={RUN}",
        "--config.checkpoint.keep_last=1",
        "--config.checkpoint.keep_best=0",
    )
    kept = {name for name in server.names("bucket") if "/checkpoints/" in name}
    assert not any("/checkpoints/4" in name for name in kept)  # keep_last=1
    for name in kept:  # as killed in the middle of saving 12
        if "/checkpoints/8/" in name and not name.endswith("commit_success.txt"):
            server.put("bucket", name.replace("/checkpoints/8/", "/checkpoints/12/"), b"half")
    found = json.loads(gpt_jax("eval", f"--workdir={RUN}", host="two").stdout.splitlines()[-1])
    assert found["step"] == 8
    gpt_jax("train", *OPTIONS, *TINY, f"--workdir={RUN}", "--config.steps=12", "--accept-changes", host="two")
    data, _ = server.objects["bucket", "runs/a/checkpoints/12/state/manifest.ocdbt"]
    assert data != b"half"


def test_a_store_that_refuses_is_told_in_one_line(server, gpt_jax):
    server.forbidden = True
    for command in ("train", "eval"):
        options = (*OPTIONS, *TINY) if command == "train" else ()
        done = gpt_jax(command, *options, f"--workdir={RUN}", code=1)
        said = [line for line in done.stderr.splitlines() if line.startswith("gpt-jax: ")]
        assert len(said) == 1 and RUN in said[0] and "Traceback" not in done.stderr
