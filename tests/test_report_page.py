"""report.html: what a run was, in one file that needs nothing else."""

import json
import re

import jax
import pytest
from helpers import tiny
from test_report import run as run  # a made-up run directory

from gpt_jax.model import Transformer
from gpt_jax.model.size import count_parameters
from gpt_jax.objectives.causal_lm import CausalLM
from gpt_jax.optim import make_optimizer
from gpt_jax.report import write_report
from gpt_jax.report_page import describe_memory
from gpt_jax.sharding import make_mesh
from gpt_jax.step import build_train_step


def step_on(devices):
    objective = CausalLM(Transformer(tiny()))
    mesh = make_mesh(devices=jax.devices()[:devices])
    return build_train_step(objective, make_optimizer("adamw", 1e-3), objective.batch_spec(8, 12), mesh=mesh, ema=0.9)


def test_memory_is_that_of_the_state_counted_leaf_by_leaf():
    step = step_on(1)
    state = step.init(0)
    memory = describe_memory(step)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(state.params)]
    assert memory["bytes"]["parameters"] == memory["bytes"]["average (EMA)"] == sum(sizes)
    assert memory["bytes"]["optimizer state"] == sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    assert memory["bytes"]["batch"] == 3 * 8 * 12 * 4 and memory["per_device"] == memory["bytes"]
    config = tiny()
    padding = (config.padded_vocab - config.vocab_size) * config.d_model
    assert sum(memory["parameters"].values()) == count_parameters(config) + padding
    assert memory["parameters"]["token embedding"] == config.padded_vocab * config.d_model
    assert memory["parameters"]["attention"] == 2 * (16 * 48 + 48 + 16 * 16 + 16)


def test_memory_of_one_device_is_what_its_shards_hold():
    step = step_on(8)
    state = step.init(0)
    memory = describe_memory(step)
    first = jax.devices()[0]
    held = sum(s.data.nbytes for x in jax.tree.leaves(state.params) for s in x.addressable_shards if s.device == first)
    assert memory["per_device"]["parameters"] == held < memory["bytes"]["parameters"]
    assert memory["devices"] == 8


def test_the_page_has_everything_and_fetches_nothing(run):
    path, _ = run
    (path / "memory.json").write_text(json.dumps(describe_memory(step_on(1))))
    (path / "spikes").mkdir()
    (path / "spikes" / "step_00000012.json").write_text(json.dumps({"step": 12, "why": {"loss": 7.5}}))
    write_report(path, {"loss": 2.5, "bits_per_byte": 1.93}, {"xz_bits_per_byte": 2.51})
    page = (path / "report.html").read_text()
    for expected in (
        "<h1>demo</h1>",
        "Least validation loss 1.5000 nats per token at step 30",
        "<td>this model</td>",
        "<td>xz -9</td>",
        "<td>tokens per second (median)</td><td>1,000</td>",
        "<td>token embedding</td>",
        "<td>optimizer state</td>",
        "loss 7.5",
        "the newest ``` sample",
        "old sample",
        "feedbeef",
        "&quot;learning_rate&quot;: 0.001" if "&quot;learning_rate" in page else '"learning_rate": 0.001',
        "<h3>Validation along the way</h3>",
    ):
        assert expected in page, expected
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']{0,40})""", page)
    assert len(sources) == 2 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert "<script" not in page and "http" not in page


def test_text_of_a_run_cannot_become_markup(run):
    path, _ = run
    (path / "samples" / "step_00000040.txt").write_text("<script>alert(1)</script> & <b>")
    write_report(path)
    page = (path / "report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;" in page


@pytest.mark.parametrize("missing", ["samples", "memory.json"])
def test_what_is_missing_is_said(run, missing):
    path, _ = run
    if missing == "samples":
        for file in (path / "samples").iterdir():
            file.unlink()
    write_report(path)
    assert ("<p>None.</p>" if missing == "samples" else "<p>Not recorded.</p>") in (path / "report.html").read_text()
