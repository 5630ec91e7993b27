"""`gpt-jax train --profile`: a trace of the steps asked for, and of no others."""

import gzip
import json
import time

import jax
import jax.numpy as jnp
import pytest

from gpt_jax.cli import main
from gpt_jax.errors import UserError
from gpt_jax.profiling import Startup, Trace, check_steps, parse_steps, process_seconds


def test_steps_are_read_as_they_are_counted():
    assert list(parse_steps("10:12")) == [10, 11, 12] and list(parse_steps("3")) == [3] and not parse_steps("")
    for text in ("0", "5:2", "a", "1:2:3", "-1"):
        with pytest.raises(UserError, match="--profile is"):
            parse_steps(text)


def test_steps_that_a_run_does_not_make_are_refused():
    check_steps(range(0), 5, 5)
    check_steps(range(3, 99), 5, 6)
    for steps, start, end in ((range(7, 9), 0, 6), (range(2, 6), 5, 9), (range(3, 4), 5, 5)):
        with pytest.raises(UserError, match=f"--profile is {steps[0]}:{steps[-1]}, and this run (makes|has made)"):
            check_steps(steps, start, end)


def test_only_the_steps_of_the_range_are_traced(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    trace = Trace("nowhere", range(3, 5))
    for step in range(1, 8):
        trace.before(step, jnp.zeros(()))
        calls.append(step)
        trace.after(step, jnp.zeros(()))
    trace.close()
    assert calls == [1, 2, "start", 3, 4, "stop", 5, 6, 7]
    trace = Trace("nowhere", range(7, 99))  # the run ends first
    trace.before(7, None)
    trace.close()
    assert calls[-2:] == ["start", "stop"]


def test_the_seconds_before_the_first_step_are_told_apart():
    times = iter([10.0, 12.5, 13.0, 14.0])
    startup = Startup(2.0, now=lambda: next(times))
    for name in ("data", "state", "data"):
        startup.mark(name)
    assert startup.seconds == {"imports": 2.0, "data": 3.5, "state": 0.5}
    assert str(startup) == "start took 6.0 s: imports 2.0, data 3.5, state 0.5"


def test_the_age_of_this_process_is_that_of_its_clock():
    before, first, after = time.monotonic(), process_seconds(), time.monotonic()
    time.sleep(0.05)
    began, second, ended = time.monotonic(), process_seconds(), time.monotonic()
    assert began - after - 0.03 <= second - first <= ended - before + 0.03  # ticks of a hundredth
    assert 0 < first < 86_400


def test_a_run_tells_where_its_start_went(tmp_path, capsys):
    keys = dict(steps=2, batch_size=8, context_length=32) | {"model.num_layers": 1, "model.d_model": 16}
    keys |= {"model.num_heads": 2, "optimizer.name": "adamw", "data.tokenizer.kind": "byte", "eval.max_batches": 1}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    assert main(["train", "--config=quickstart", f"--workdir={tmp_path}/run", *flags]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("start took ")]
    names = ["imports", "join", "workdir and devices", "data and model", "fresh state", "evaluators and hooks"]
    spent = json.loads((tmp_path / "run" / "environment.json").read_text())["start_seconds"]
    assert list(spent) == [*names, "compiling the step"] and all(f"{name} " in line for name in spent)
    assert spent["compiling the step"] > 0 and spent["data and model"] > 0
    assert "compiling the step" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.slow
def test_a_run_leaves_a_trace_with_the_steps_in_it(tmp_path, capsys):
    keys = dict(steps=4, batch_size=8, context_length=32) | {"model.num_layers": 1, "model.d_model": 16}
    keys |= {"model.num_heads": 2, "optimizer.name": "adamw", "data.tokenizer.kind": "byte"}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    assert main(["train", "--config=quickstart", f"--workdir={tmp_path}/run", "--profile=2:3", *flags]) == 0
    (file,) = (tmp_path / "run" / "profile").glob("**/*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert sum("update" in e.get("name", "") for e in events) >= 2


def test_a_run_refuses_to_trace_steps_that_it_does_not_make(tmp_path, capsys):
    keys = dict(steps=2, batch_size=8, context_length=32) | {"model.num_layers": 1, "model.d_model": 16}
    keys |= {"model.num_heads": 2, "data.tokenizer.kind": "byte"}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    assert main(["train", "--config=quickstart", f"--workdir={tmp_path}/run", "--profile=500:502", *flags]) == 1
    said = capsys.readouterr()
    assert "--profile is 500:502, and this run makes the steps 1 to 2." in said.err and "step 00001" not in said.out
