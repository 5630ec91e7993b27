"""`gpt-jax train --profile`: a trace of the steps asked for, and of no others."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from gpt_jax.cli import main
from gpt_jax.errors import UserError
from gpt_jax.profiling import Trace, parse_steps


def test_steps_are_read_as_they_are_counted():
    assert list(parse_steps("10:12")) == [10, 11, 12] and list(parse_steps("3")) == [3] and not parse_steps("")
    for text in ("0", "5:2", "a", "1:2:3", "-1"):
        with pytest.raises(UserError, match="--profile is"):
            parse_steps(text)


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


@pytest.mark.slow
def test_a_run_leaves_a_trace_with_the_steps_in_it(tmp_path, capsys):
    keys = dict(steps=4, batch_size=8, context_length=32) | {"model.num_layers": 1, "model.d_model": 16}
    keys |= {"model.num_heads": 2, "optimizer.name": "adamw", "data.tokenizer.kind": "byte"}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    assert main(["train", "--config=quickstart", f"--workdir={tmp_path}/run", "--profile=2:3", *flags]) == 0
    (file,) = (tmp_path / "run" / "profile").glob("**/*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert sum("update" in e.get("name", "") for e in events) >= 2
