"""Mistakes and damage met by the real commands: one line on standard error that names the value, exit code 1.

The messages themselves are tested beside what raises them; here they come through `gpt-jax`.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from gpt_jax.checkpoint import list_steps
from gpt_jax.cli import main
from gpt_jax.data.build import build_store
from gpt_jax.data.tokenizer import ByteTokenizer

TINY = {
    "steps": 4,
    "batch_size": 8,
    "context_length": 16,
    "model.num_layers": 1,
    "model.d_model": 16,
    "model.num_heads": 2,
    "data.tokenizer.kind": "byte",
    "data.tokenizer.specials": "('eot',)",
    "data.split": "tail",
    "eval.every_steps": 0,
    "checkpoint.every_steps": 2,
    "sample.prompts": "()",
    "log.tensorboard": False,
}


def arguments(folder, settings):
    """Of `gpt-jax train` on the text in `folder`, with whatever a case has otherwise."""
    merged = TINY | {"data.path": folder / "text.txt"} | settings
    overrides = [f"--config.{key}={value}" for key, value in merged.items()]
    return ["train", "--config=quickstart", f"--workdir={folder / 'run'}", *overrides]


def start(flags, limit=None):
    """Starts `gpt-jax`; `limit` is the size in bytes at which a file meets the end of the device."""
    code = "import sys; from gpt_jax.cli import main; sys.exit(main())"
    if limit:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {code}"
    return subprocess.Popen([sys.executable, "-c", code, *flags], stdout=-1, stderr=-1, text=True)


def run(flags, limit=None):
    process = start(flags, limit)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def assert_one_line(err, *said):
    assert err.startswith("gpt-jax: ") and err.endswith("\n") and err.count("\n") == 1, err
    for text in said:
        assert text in err, err


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a text and a token store, and a cache of its own."""
    monkeypatch.setenv("GPT_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("A line of text that is repeated.\n" * 200)
    (tmp_path / "empty.txt").write_text("")
    row = {"prompt": "a", "choices": ["b", "c" * 20], "answer": 0}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "small.txt").write_text("Too little.\n")
    documents = [("train", "some text " * 50)] * 5 + [("valid", "held out " * 50)]
    for name in ("store", "damaged"):
        build_store(documents, ByteTokenizer(("eot",)), tmp_path / name)
    tokens = tmp_path / "damaged" / "train.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-10])
    ByteTokenizer(("eot", "mask")).save(tmp_path / "other")
    return tmp_path


CASES = {
    "missing file": ({"data.path": "{}/absent.txt"}, ["{}/absent.txt"]),
    "no file matches": ({"data.path": "{}/*.jsonl.zst"}, ["{}/*.jsonl.zst"]),
    "unknown format": ({"data.path": "{}/run.docx"}, ["run.docx"]),
    "empty corpus": ({"data.path": "{}/empty.txt"}, ["{}/empty.txt"]),
    "less than a batch": ({"data.path": "{}/small.txt"}, ["small.txt", "batch"]),
    "wrong tokenizer": (
        {"data.path": "{}/store", "data.tokenizer.path": "{}/other"},
        ["{}/store was made with another tokenizer"],
    ),
    "damaged store": ({"data.path": "{}/damaged"}, ["damaged", "{}/damaged/train.tokens"]),
    "mistyped key": ({"model.num_layer": 3}, ["'model.num_layer' (did you mean 'num_layers'?)"]),
    "mistyped objective": ({"objective.name": "causal_ml"}, ["'causal_ml' (did you mean 'causal_lm'?)"]),
    "mistyped option": ({"objective.z_los": 1}, ["'objective.z_los' (did you mean 'z_loss'?)"]),
    "heads": ({"model.num_heads": 3}, ["num_heads", "3", "16"]),
    "rows by devices": ({"batch_size": 12}, ["batch_size is 12", "8 devices"]),
    "rows by micro-batches": ({"batch_size": 16, "microbatches": 3}, ["batch_size is 16", "microbatches=3"]),
    "mesh": ({"mesh.fsdp": 3}, ["fsdp", "3", "8"]),
    "optimizer's argument": ({"optimizer.kwargs": "{'nesterof': True}"}, ["'nesterof' (did you mean 'nesterov'?)"]),
    "numbers": ({"objective.clip": "(0.5)"}, ["objective.clip is 0.5; it takes a tuple of numbers"]),
    "pairs": (
        {"init.rename": "('^model/','reference/')"},
        ["init.rename has '^model/'", "(('^model/', 'reference/'),)"],
    ),
    "regex": ({"init.rename": "(('(model/', ''),)"}, ["init.rename has ('(model/', '')", "pairs of a regex"]),
    "group of a regex": ({"init.rename": r"(('^model/', r'\1'),)"}, ["init.rename has", "invalid group reference 1"]),
    "missing benchmark": ({"eval.tasks": "('choices:{}/absent.jsonl',)"}, ["{}/absent.jsonl"]),
    "option too long": (
        {"eval.tasks": "('choices:{}/long.jsonl',)"},
        ["benchmark choices", "continuation has 21 tokens", "reads 16"],
    ),
    "tables": ({"data.sources": "(1,2)"}, ["data.sources has 1", "each is a table"]),
}


def flags_of(folder, case):
    settings, said = CASES[case]
    settings = {key: str(value).replace("{}", str(folder)) for key, value in settings.items()}
    return arguments(folder, settings), [text.replace("{}", str(folder)) for text in said]


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_that_names_it_and_exit_code_1(folder, capfd, case):
    flags, said = flags_of(folder, case)
    assert main(flags) == 1
    assert_one_line(capfd.readouterr().err, *said)


@pytest.mark.slow
def test_a_process_of_its_own_says_no_more(folder):
    processes = {case: (start(flags_of(folder, case)[0]), flags_of(folder, case)[1]) for case in ("heads", "mesh")}
    processes["config"] = (start(["train", "--config=quickstrat"]), ["'quickstrat' (did you mean 'quickstart'?)"])
    processes["command"] = (start(["trian"]), ["'trian' (did you mean 'train'?)"])
    processes["flag"] = (start(["train", "--config=quickstart", "--worddir=x"]), ["--worddir=x"])
    for process, said in processes.values():
        _, err = process.communicate(timeout=120)
        assert process.returncode == 1
        assert_one_line(err, *said)


@pytest.mark.slow
def test_a_full_device_is_one_line_wherever_it_is_met_and_the_run_goes_on_when_there_is_room(folder):
    """The limit on the size of a file stands for the end of the device."""
    (folder / "text.txt").write_text("A line of text that is repeated.\n" * 4000)
    flags = arguments(folder, {})
    code, _, err = run(flags, limit=100_000)  # less than the tokens
    assert code == 1
    assert_one_line(err, "no space left on the device for the token store")
    (folder / "cache" / "xla").mkdir(exist_ok=True)
    wide = arguments(folder, {"model.d_model": 256})
    code, _, err = run(wide, limit=1_000_000)  # less than a checkpoint
    assert code == 1
    said = [line for line in err.splitlines() if line.startswith("gpt-jax: ")]
    assert len(said) == 1 and "no space left on the device for checkpoint 2" in said[0], err
    assert "Traceback" not in err
    code, _, err = run(wide)
    assert code == 0 and list_steps(folder / "run" / "checkpoints")[-1] == 4, err


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_by_every_command_with_the_good_one_before_it(folder):
    assert run(arguments(folder, {}))[0] == 0
    newest = folder / "run" / "checkpoints" / "4"
    for file in (newest / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-5])
    workdir = f"--workdir={folder / 'run'}"
    for flags in (["eval", workdir], ["sample", workdir, "--prompt=A"], arguments(folder, {"steps": 6})):
        code, _, err = run(flags)
        assert code == 1
        assert_one_line(err, "checkpoint 4", "damaged", "newest good one is 2", str(newest))
    code, out, _ = run(["eval", workdir, "--step=2"])
    assert code == 0 and '"step": 2' in out


@pytest.mark.slow
def test_a_workdir_in_use_is_refused_and_kill_9_frees_it(folder):
    flags = arguments(folder, {"steps": 10**6})
    first = start(flags)
    try:
        while not (folder / "run" / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.05)
        code, _, err = run(flags)
        assert code == 1
        assert_one_line(err, f"in use by process {first.pid}", str(folder / "run"))
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    steps = list_steps(folder / "run" / "checkpoints")
    third = start(flags)
    began = time.monotonic()
    while max(list_steps(folder / "run" / "checkpoints"), default=0) <= max(steps, default=0):
        assert third.poll() is None and time.monotonic() - began < 120
        time.sleep(0.05)
    os.kill(third.pid, signal.SIGTERM)
    out, err = third.communicate(timeout=60)
    assert third.returncode == 75, err
    assert not steps or re.search(rf"continuing at step {steps[-1]} of", out)
