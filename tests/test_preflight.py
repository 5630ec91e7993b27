"""The pre-flight: single checks here, and the whole of it with four processes of which one is wrong."""

import json
import os
import pathlib
import subprocess
import sys
import threading

import jax
import pytest

from gpt_jax import device_checks, preflight
from gpt_jax.cli import main
from gpt_jax.config import resolve
from gpt_jax.data.build import build_store
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.device_checks import Check, check_matmul, check_memory, measure_collective
from gpt_jax.preflight import check_data, check_devices, odd_ones, run_preflight
from gpt_jax.remote import Remote
from gpt_jax.sharding import make_mesh

ROOT = pathlib.Path(__file__).resolve().parent.parent


def flight(tmp_path, **settings):
    lines = []
    code = run_preflight(resolve(settings), workdir=str(tmp_path / "run"), environ={}, log=lines.append)
    return code, lines, json.loads(lines[-1])


def test_all_is_well_on_this_machine(tmp_path):
    code, lines, result = flight(tmp_path, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    assert code == 0 and result["ok"] and result["seconds"] < 60
    checks = result["checks"]
    assert checks["devices"]["devices"] == 8 and checks["processes"]["processes"] == 1
    assert {name for name in checks if name.startswith("all-")} == {
        f"{kind} {axis}" for kind in ("all-reduce", "all-gather") for axis in ("data", "fsdp", "tensor")
    }
    assert checks["all-reduce fsdp"]["ok"] and checks["all-reduce fsdp"]["gb_per_s"] > 0
    assert checks["workdir"]["write_mib_per_s"] > 0 and checks["matmul"]["flops_per_s"][7] > 1e6
    assert not list((tmp_path / "run").iterdir())
    assert lines[0].startswith("ok     processes            1 on 1 host, ")


def test_what_is_wrong_is_named_and_the_code_is_1(tmp_path):
    (tmp_path / "run").write_text("a file where the workdir should be")
    code, lines, result = flight(
        tmp_path, distributed={"devices": 16, "device_kind": "v5p"}, data={"path": str(tmp_path / "missing.txt")}
    )
    assert code == 1 and result["wrong"] == ["device kind", "devices", "data", "workdir"]
    shown = "\n".join(lines)
    assert "WRONG  device kind          process 0 on " in shown and "has 'cpu'" in shown
    assert "8, expected 16" in shown and "missing.txt': no such file" in shown


def test_a_collective_that_gives_wrong_numbers_is_noticed(monkeypatch):
    mesh = make_mesh(data=2, fsdp=4)
    assert measure_collective(mesh, "fsdp", "all-reduce", repeats=1).ok
    right = jax.lax.psum
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis: right(x, axis) + (jax.lax.axis_index(axis) == 2))
    check = measure_collective(mesh, "fsdp", "all-reduce", repeats=1)
    assert check.ok is False and "wrong numbers on process 0 on " in check.found


def test_a_check_that_a_device_has_no_memory_for_is_wrong_and_ends_nothing(monkeypatch):
    assert [device_checks.collective_size("tpu", "all-gather", ways) >> 20 for ways in (2, 16, 256)] == [64, 64, 4]
    assert device_checks.collective_size("tpu", "all-reduce", 256) >> 20 == 64

    def refuse(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.")

    monkeypatch.setattr(jax, "make_array_from_callback", refuse)
    monkeypatch.setattr(device_checks, "matmul_rate", refuse)
    for check in (measure_collective(make_mesh(data=2, fsdp=4), "fsdp", "all-gather"), check_matmul()):
        assert check.ok is False and "process 0 on " in check.found
        assert check.found.endswith(": RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.")


def test_too_little_memory_is_said():
    assert check_memory(1 << 60).ok is False and "needed" in check_memory(1 << 60).found
    assert check_memory(1).ok and check_memory(0).ok is None


def test_the_odd_one_is_the_one_that_differs_from_most():
    assert odd_ones(["a", "a", "b", "a"]) == [2]
    assert odd_ones([1, 2]) == [1]
    assert odd_ones([3, 3]) == []


def test_the_data_are_compared_by_their_content(tmp_path, monkeypatch):
    for host, last in (("a", b"x"), ("b", b"y")):
        (tmp_path / host).mkdir()
        (tmp_path / host / "text.txt").write_bytes(b"-" * 3_000_000 + last)
    found = [preflight.data_files(resolve({"data": {"path": str(tmp_path / h / "*.txt")}}).data) for h in "ab"]
    assert [entry[0][:2] for entry in found] == [("text.txt", 3_000_001)] * 2
    assert found[0][0][2] != found[1][0][2]
    prints = [preflight.distributed.fingerprint(f) for f in found]
    rows = [["h0", prints[0], 1, ""], ["h1", prints[0], 1, ""], ["h2", prints[1], 1, ""]]
    monkeypatch.setattr(preflight.distributed, "gather", lambda value: rows)
    check = check_data(resolve({"data": {"path": str(tmp_path / "a" / "*.txt")}}).data)
    assert check.ok is False and "the files of process 2 on 'h2' are not those of the others" in check.found


def test_of_data_in_an_object_store_a_piece_is_read_and_its_rate_told(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(preflight, "_READ", 100_000)
    (tmp_path / "large.jsonl.zst").write_bytes(bytes(500_000))
    (tmp_path / "small.txt").write_text("hello")
    store = build_store([("train", "to be " * 20_000)], ByteTokenizer(("eot",)), tmp_path / "store", workers=1)
    read = []
    whole = Remote.read
    monkeypatch.setattr(Remote, "read", lambda *a: read.append(whole(*a)) or read[-1])
    check = check_data(
        resolve({"data": {"path": f"file://{tmp_path}/large.jsonl.zst,file://{tmp_path}/small.txt"}}).data
    )
    assert check.ok and check.values["read_mib_per_s"] > 0 and " MiB/s by the slowest process" in check.found
    assert check.values["files"] == 2 and check.values["bytes"] == 5
    assert "(1 of unknown size not counted)" in check.found
    assert sum(len(data or b"") for data in read) == 100_005 and not (tmp_path / "cache").exists()  # nothing is copied
    read.clear()
    check = check_data(resolve({"data": {"path": f"file://{store.path}"}}).data)
    assert check.ok and check.values["read_mib_per_s"] > 0 and len(read[-1]) == 100_000
    assert check.values["bytes"] == sum(entry["size"] for entry in store.manifest["files"].values()) > 240_000
    (store.path / "train.tokens").unlink()
    for path, said in (
        (f"file://{store.path}", "train.tokens is missing"),
        (f"file://{tmp_path}/no.txt", "no such object"),
    ):
        check = check_data(resolve({"data": {"path": path}}).data)
        assert check.ok is False and said in check.found
    assert "globs are of files here" in check_data(resolve({"data": {"path": "gs://bucket/*.txt"}}).data).found


def test_the_files_of_tasks_are_data(tmp_path):
    for name in ("train.tsv", "valid.tsv", "other.tsv", "own.py"):
        (tmp_path / name).write_text(name)
    own = {"name": "classification", "train": f"{tmp_path}/train.tsv", "valid": f"{tmp_path}/valid.tsv", "test": "/no"}

    def names(tasks, **settings):
        config = resolve({"data": {"tasks": tasks, **settings}})
        return [entry[0] for entry in preflight.data_files(config.data)]

    assert names((own,)) == ["train.tsv", "valid.tsv"]
    assert names((own | {"test": f"{tmp_path}/other.tsv"},), valid_split="test") == ["train.tsv", "other.tsv"]
    (tmp_path / "own.py").write_text(f"def task(path='{tmp_path}/other.tsv'): ...")
    assert names((f"{tmp_path}/own.py:task", "synthetic_arithmetic")) == ["other.tsv", "own.py"]
    assert names(({"name": "shortened", "task": own, "tokenizer": "t", "budget": 9},)) == ["train.tsv", "valid.tsv"]
    parts = {"a": {"name": "causal_lm"}, "b": {"name": "classify", "data": {"tasks": (own | {"valid": "/gone.tsv"},)}}}
    config = resolve({"objective": {"name": "mixture", "tasks": parts}})
    check = check_data(config.data, preflight.parts_of(config.objective))
    assert check.ok is False and "/gone.tsv" in check.found


def test_a_host_with_other_devices_is_named(monkeypatch):
    rows = [["h0", ["TPU v5p"], 4], ["h1", ["TPU v5p"], 4], ["h2", ["TPU v4"], 3]]
    monkeypatch.setattr(preflight.distributed, "gather", lambda value: rows)
    kind, number = check_devices(12, "")
    assert not kind.ok and "process 2 on 'h2' has 'TPU v4'" in kind.found
    assert not number.ok and number.found == "11, expected 12; process 2 on 'h2' has 3"


def test_the_time_that_there_is_is_kept_to(tmp_path):
    lines = []
    code = run_preflight(resolve({}), environ={}, seconds=1e-6, log=lines.append)
    assert code == preflight.LEFT_OUT == 3 and len(lines) == 2
    assert "left out after 0 s: processes, devices, data, memory, workdir, cache, matmul, collectives" in lines[0]
    result = json.loads(lines[-1])
    assert not result["ok"] and not result["wrong"] and result["left_out"][-1] == "collectives"


def test_a_check_that_never_returns_is_named_and_ends_the_process(monkeypatch, capsys):
    ended, codes, lines = threading.Event(), [], []
    monkeypatch.setattr(preflight.os, "_exit", lambda code: codes.append(code) or ended.set())
    monkeypatch.setattr(preflight, "check_processes", lambda: Check("processes", ended.wait(30), "at last"))
    run_preflight(resolve({}), environ={}, limit=0.1, log=lines.append)
    assert codes == [1] and lines[0].startswith("WRONG  processes            not done after 0.1 s on process 0 on ")
    result = json.loads(lines[1])
    assert result["wrong"] == ["processes"] and result["left_out"][0] == "devices" and not result["ok"]
    assert "gpt-jax: pre-flight: processes: not done after 0.1 s" in capsys.readouterr().err


def test_a_slow_device_is_named(monkeypatch):
    rates = iter([1e14] * 7 + [1e13])
    device = type("Device", (), {"platform": "tpu", "device_kind": "TPU v4"})
    monkeypatch.setattr(jax, "local_devices", lambda: [device] * 8)
    monkeypatch.setattr(device_checks, "matmul_rate", lambda device, size: next(rates))
    check = check_matmul()
    assert check.ok is False and "device 7 at 10" in check.found and check.found.count("process 0") == 4  # of 275: far
    monkeypatch.setattr(device_checks, "matmul_rate", lambda device, size: 2e14)
    assert check_matmul().ok


def test_state_needs_what_its_parameters_do():
    model = {"vocab_size": 256, "d_model": 64, "num_layers": 2}
    config = resolve({"model": model | {"max_positions": 64}, "context_length": 64})
    from gpt_jax.model.size import count_parameters

    assert preflight.state_bytes(config) == count_parameters(config.model) * 16 // 8
    own = resolve({"model": model | {"vocab_size": 0}, "data": {"tokenizer": {"kind": "byte"}}})
    larger = resolve({"model": model | {"vocab_size": 256 + 4}})
    assert preflight.state_bytes(own) == preflight.state_bytes(larger)
    assert preflight.state_bytes(resolve({"data": {"tokenizer": {"kind": "char"}}})) == 0  # not known yet


def test_memory_is_held_against_the_plan_or_against_the_state(tmp_path):
    lines = []
    run_preflight(resolve({}), needed_bytes=1 << 60, environ={}, seconds=9, log=lines.append)
    assert any("WRONG  memory" in line and "1073741824.00 GiB needed (by the plan)" in line for line in lines)
    _, _, result = flight(tmp_path)
    memory = result["checks"]["memory"]
    assert memory["ok"] and memory["needed_bytes"] > 0
    assert memory["needed_by"] == "parameters, gradient and moments alone" in memory["found"]


def test_the_command_hands_on_what_the_plan_needs_and_the_exit_code(monkeypatch):
    given = {}
    monkeypatch.setattr(preflight, "run_preflight", lambda config, **options: given.update(options) or 3)
    assert main(["plan", "--config=quickstart", "--here", "--needed-bytes=12", "--seconds=5", "--limit=9"]) == 3
    assert given["needed_bytes"] == 12 and given["seconds"] == 5 and given["limit"] == 9
    assert preflight.main(["--config=quickstart", "--seconds=7", "--config.mesh.data=2"]) == 3
    assert given["seconds"] == 7 and given["workdir"] == ""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--confg=quickstart"], "--config"),
        (["--config=quikstart"], "did you mean 'quickstart'?"),
        (["--config=quickstart", "--needed-bytes=much"], "invalid int value: 'much'"),
    ],
)
def test_both_of_its_names_tell_a_mistake_in_the_same_line(capsys, flags, said):
    assert preflight.main(flags) == 1 == main(["plan", "--here", *flags])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1] and lines[0].startswith("gpt-jax: ") and said in lines[0]


def test_with_json_a_preflight_prints_its_last_line_alone(monkeypatch, capsys):
    def flown(config, *, log, **options):
        log("ok   devices: 8")
        log('{"ok": true}')
        return 0

    monkeypatch.setattr(preflight, "run_preflight", flown)
    assert main(["plan", "--config=quickstart", "--here", "--json"]) == 0
    assert capsys.readouterr().out == '{"ok": true}\n'
    assert main(["plan", "--config=quickstart", "--here"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_mesh_is_the_one_of_the_run(tmp_path, monkeypatch):
    _, _, result = flight(tmp_path, mesh={"slices": 3})
    assert "mesh.slices is 3, which does not divide the 8 devices" in result["checks"]["collectives"]["found"]
    halves = lambda devices, slices: [devices[:4], devices[4:]]  # noqa: E731
    monkeypatch.setattr("gpt_jax.sharding._slices", halves)  # as two slices of a TPU say
    code, _, result = flight(tmp_path, mesh={"slice_axis": "fsdp"})
    assert code == 0 and result["checks"]["all-reduce fsdp"]["ok"] and result["checks"]["memory"]["ok"]


def test_a_mesh_that_cannot_be_is_named(tmp_path):
    code, lines, result = flight(tmp_path, mesh={"tensor": 3, "fsdp": 1})
    assert code == 1 and result["wrong"] == ["collectives"]
    assert any("WRONG  collectives" in line and "does not make up the 8 devices" in line for line in lines)


# ---- four processes


def four(script, tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "gpt_jax.launch", "--processes", "4", "--", "bash", "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def command(tmp_path, more=""):
    flags = f"--workdir={tmp_path}/run --config.mesh.tensor=2 --config.data.path={tmp_path}/text.txt"
    return f"exec {sys.executable} -m gpt_jax.preflight --config=quickstart {flags} {more}"


@pytest.mark.slow
def test_four_processes_pass(tmp_path):
    (tmp_path / "text.txt").write_text("hello\n" * 100)
    done = four(command(tmp_path, "--config.distributed.devices=4"), tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["ok"] and result["checks"]["processes"]["processes"] == 4
    assert result["seconds"] < 60
    assert all(
        result["checks"][f"{kind} {axis}"]["ok"] for kind in ("all-reduce", "all-gather") for axis in ("fsdp", "tensor")
    )
    assert sum(line.startswith("ok     devices") for line in done.stdout.splitlines()) == 1  # process 0 alone speaks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("export XLA_FLAGS=--xla_force_host_platform_device_count=2", "process 2 on 'HOST' has 2"),
        ("rm -rf X; mkdir X; cd X; echo other > text.txt; DATA=--config.data.path=$PWD/text.txt", "the config differs"),
        ("WORKDIR=--workdir=/dev/null/run", "--workdir differs: process 2 on 'HOST' has \"/dev/null/run\""),
    ],
    ids=["devices", "config", "workdir"],
)
def test_one_of_four_is_wrong_and_is_named(tmp_path, wrong, message):
    (tmp_path / "text.txt").write_text("hello\n" * 100)
    script = f"cd {tmp_path}; if [ $GPT_JAX_PROCESS_ID = 2 ]; then {wrong}; fi; " + command(
        tmp_path, "--config.distributed.devices=4 $DATA $WORKDIR"
    )
    done = four(script, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert message.replace("HOST", os.uname().nodename) in done.stdout + done.stderr
    assert "process 2 on" in done.stdout + done.stderr and "Traceback" not in done.stderr
