"""Runs on tasks from end to end: weights of another run, mixtures resumed bit for bit, one task as a mixture of one."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from gpt_jax.config import resolve
from gpt_jax.errors import UserError
from gpt_jax.inherit import following_init
from gpt_jax.metrics import read_rows
from gpt_jax.run import build_run, restore_run
from gpt_jax.train import train

TINY = {
    "steps": 4,
    "batch_size": 8,
    "context_length": 32,
    "model": {"num_layers": 2, "d_model": 16, "num_heads": 2, "positions": "rope"},
    "data": {"tokenizer": {"kind": "byte"}},
    "eval": {"every_steps": 0, "max_batches": 1},
    "checkpoint": {"every_steps": 2},
    "log": {"tensorboard": False},
    "sample": {"prompts": ()},
}
CLASSIFY = {"objective": {"name": "classify"}, "data": {**TINY["data"], "tasks": ("toy_tasks:colours",)}}
MIXTURE = {
    "batch_size": 24,
    "objective": {
        "name": "mixture",
        "tasks": {
            "text": {"name": "causal_lm", "rows": 8},
            "colours": {"name": "classify", "rows": 8, "data": {"tasks": ("toy_tasks:colours", "toy_tasks:pairs")}},
            "reverse": {"name": "supervised", "rows": 8, "max_new": 4, "data": {"tasks": ("toy_tasks:reverse",)}},
        },
    },
}


def config(**changes):
    return resolve(TINY | changes)


def quiet(line):
    pass


def rows_without_perf(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run on text of which others start."""
    workdir = tmp_path_factory.mktemp("base")
    train(config(), str(workdir), log=quiet)
    return workdir


@pytest.mark.slow
def test_a_run_from_anothers_weights_has_its_shape_tokenizer_and_values(base, tmp_path):
    from gpt_jax.checkpoint_parts import load_params
    from gpt_jax.train import initial_state

    lines = []
    changes = CLASSIFY | {"init": {"from": str(base)}, "model": {"num_layers": 1, "d_model": 32, "dropout": 0.1}}
    run = build_run(config(**changes), lines.append)
    assert run.config.model == dataclasses.replace(build_run(config(), quiet).config.model, dropout=0.1)
    assert any("num_layers=2, d_model=16" in line for line in lines)
    state = initial_state(run, lines.append)
    assert int(state.step) == 0 and any("classifier" in line for line in lines)
    jax.tree.map(np.testing.assert_array_equal, state.params["model"], load_params(base / "checkpoints")["model"])


def test_a_config_may_keep_its_own_shape_and_tokenizer(tmp_path):
    source = tmp_path / "run"
    (source / "tokenizer").mkdir(parents=True)
    (source / "config.json").write_text(json.dumps({"model": {"num_layers": 3, "dropout": 0.5, "remat": "full"}}))
    given = config(init={"from": str(source), "model": False}, data={"tokenizer": {"path": "mine"}})
    assert following_init(given, quiet) == given
    for path in (source, source / "checkpoints", source / "checkpoints" / "40"):  # or one checkpoint of it
        followed = following_init(config(init={"from": str(path)}), quiet)
        assert followed.model.num_layers == 3 and followed.model.dropout == 0.0 and followed.model.remat == "none"
        assert followed.data.tokenizer.path == str(source / "tokenizer")


@pytest.mark.slow
def test_a_run_goes_on_when_the_one_it_started_from_is_gone(base, tmp_path):
    source, workdir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(base, source)
    changes = {"init": {"from": str(source)}, "model": {"num_layers": 1, "d_model": 32, "positions": "rope"}}
    train(config(**changes), str(workdir), log=quiet)
    before = json.loads((workdir / "config.json").read_text())
    assert before["model"]["num_layers"] == 2 and before["data"]["tokenizer"]["path"] == str(source / "tokenizer")
    shutil.rmtree(source)
    lines = []
    done = train(config(**changes | {"steps": 6}), str(workdir), log=lines.append)
    assert done["step"] == 6 and any("that is gone" in line for line in lines)
    assert json.loads((workdir / "config.json").read_text()) == before | {"steps": 6}
    run, _, step = restore_run(str(workdir))
    assert step == 6 and run.config.model.num_layers == 2
    with pytest.raises(UserError, match="no checkpoint in"):
        train(config(**changes), str(tmp_path / "another"), log=quiet)


@pytest.mark.slow
def test_a_mixture_of_tasks_resumes_bit_for_bit(tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(config(**MIXTURE), str(whole), log=quiet)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "4")  # as if the run had been killed before it was saved
    train(config(**MIXTURE), str(again), log=quiet)
    expected, found = rows_without_perf(whole), rows_without_perf(again)
    assert found == expected
    assert {"train/loss/text/lm", "train/loss/colours/classify", "train/loss/reverse/lm"} <= expected[3].keys()
    assert {"valid/reverse/exact_match", "valid/colours/pairs/accuracy", "valid/text/bits_per_byte"} <= found[3].keys()


@pytest.mark.slow
def test_a_mixture_of_one_task_is_that_task(tmp_path):
    alone = {"objective": {"name": "classify"}, "data": {**TINY["data"], "tasks": ("toy_tasks:colours",)}}
    inside = {"objective": {"name": "mixture", "tasks": {"colours": {"name": "classify"}}}, "data": alone["data"]}
    losses = []
    for name, changes in (("alone", alone), ("inside", inside)):
        train(config(**changes), str(tmp_path / name), log=quiet)
        losses.append([row["train/loss"] for row in rows_without_perf(tmp_path / name)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
