"""gpt-jax rerun and replay, and what a spike leaves: on a small run whose data has one bad row."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from helpers import params_of, text_batch, tiny
from toys import Bigram

from gpt_jax import cli
from gpt_jax.config import resolve
from gpt_jax.config_changes import DATA
from gpt_jax.errors import UserError
from gpt_jax.forensics.rerun import check_unbroken, read_recorded, run_at
from gpt_jax.forensics.spikes import Watch, build_examine
from gpt_jax.metrics import MetricsWriter
from gpt_jax.model import Transformer
from gpt_jax.objectives.causal_lm import CausalLM
from gpt_jax.objectives.compose import Mixture
from gpt_jax.optim import make_optimizer
from gpt_jax.sharding import make_mesh
from gpt_jax.step import build_train_step, gradients, row_keys
from gpt_jax.train import train
from gpt_jax.workdir import Workdir

CONFIG = {
    "steps": 24,
    "batch_size": 8,
    "context_length": 16,
    "model": {"num_layers": 2, "d_model": 16, "num_heads": 2, "dropout": 0.1},
    "data": {"split": "tail", "tokenizer": {"kind": "byte"}},
    "eval": {"every_steps": 0, "max_batches": 1},
    "checkpoint": {"every_steps": 10, "keep_every_steps": 10},
    "sample": {"prompts": ()},
    "log": {"tensorboard": False},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 24 steps with a checkpoint at 10 and 20, whose loss becomes infinite at step 22."""
    folder = tmp_path_factory.mktemp("rerun")
    (folder / "text.txt").write_text("the cat sat on the mat. " * 200)
    tree = json.loads(json.dumps(CONFIG))
    tree["data"]["path"] = str(folder / "text.txt")
    tree["objective"] = {"name": "test_rerun:Spoilt"}
    train(resolve(tree), str(folder / "run"), log=lambda line: None)
    return folder / "run"


@dataclasses.dataclass(frozen=True)
class Spoilt(CausalLM):
    """Causal LM in which a weight of row 5 overflows in step 21 (counted from 0)."""

    def prepare(self, batch, keys, step):
        factor = jax.numpy.where(step == 21, 1e30, 1.0)
        weights = batch["target_weights"].at[5, 3].multiply(factor).at[5, 3].multiply(factor)
        return super().prepare({**batch, "target_weights": weights}, keys, step)


def command(capsys, *arguments):
    code = cli.main(list(arguments))
    return code, json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.slow
def test_the_first_steps_are_the_same_bits_until_something_is_changed(run, capsys):
    code, result = command(capsys, "rerun", str(run), "--steps=6")
    assert code == 0 and result["same"] and result["steps"] == 6 and result["compared"] >= 24
    assert "data.texts.text.sha256" not in result["environment"]
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"seed": 1}))
    code, result = command(capsys, "rerun", str(run), "--steps=6")
    (run / "config.json").write_text(json.dumps(config))
    assert code == 1 and result["first_difference"]["step"] == 1 and result["largest_relative"] > 1e-4


@pytest.mark.slow
def test_a_step_is_reproduced_from_the_checkpoint_before_it(run, capsys):
    code, result = command(capsys, "replay", str(run), "--step=13")
    assert code == 0 and result["same"] and result["finite"] and result["from"] == 10 and result["culprit"] is None
    saved = json.loads((run / "replay" / "step_00000013.json").read_text())
    rows = np.array(saved["rows"]["weights/lm"])
    assert rows.shape == (8,) and rows.mean() == pytest.approx(saved["metrics"]["loss"], rel=1e-4)
    assert len(saved["ids"]["row"]) == 8 and saved["ids"]["row"][0] == 12 * 8
    norms = saved["gradient_norms"]
    total = np.sqrt(sum(np.sum(np.square(value)) for value in norms.values()))
    assert total == pytest.approx(saved["metrics"]["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_a_step_that_went_wrong_names_what_did_first(run, capsys):
    spike = json.loads((run / "spikes" / "step_00000022.json").read_text())
    assert spike["why"]["loss"] == "not finite" and len(spike["ids"]["row"]) == 8
    bad = [i for i, loss in enumerate(spike["rows"]["weights/lm"]) if isinstance(loss, str)]
    assert bad == [5]
    code, result = command(capsys, "replay", str(run), "--step=22")
    assert code == 0 and result["same"] and not result["finite"]
    culprit = result["culprit"]
    assert (culprit["phase"], culprit["rows"], culprit["tokens"]) == ("prepare", [5], [3])


@pytest.mark.slow
def test_a_run_that_went_on_with_other_settings_is_repeated_as_it_was(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    tree = json.loads(json.dumps(CONFIG)) | {"steps": 4, "optimizer": {"learning_rate": 0.01}}
    tree["data"]["path"], tree["checkpoint"] = str(tmp_path / "text.txt"), {"every_steps": 2, "keep_every_steps": 2}
    work, quiet = str(tmp_path / "run"), dict(log=lambda line: None)
    train(resolve(tree), work, **quiet)
    train(resolve(tree | {"steps": 8, "optimizer": {"learning_rate": 0.002}}), work, accept_changes=True, **quiet)
    for arguments in (
        ["rerun", "--steps=3"],
        ["rerun", "--steps=4"],
        *(["replay", f"--step={n}"] for n in (1, 4, 5, 8)),
    ):
        code, result = command(capsys, *arguments, work)
        assert code == 0 and result["same"], arguments
    assert cli.main(["rerun", work, "--steps=6"]) == 1
    error = capsys.readouterr().err
    assert "--steps=6: the run went on from step 4 with steps: 4 -> 8; optimizer.learning_rate: 0.01 -> 0.002" in error
    assert "ask for 4 at most" in error and error.count("\n") == 1


def test_changes_hold_from_the_step_that_the_run_last_went_on_from(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"steps": 9}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    first, second = {"steps": [3, 6]}, {"steps": [6, 9]}
    events = [("start", 0, {}), ("change", 6, first), ("resume", 6, {}), ("finish", 8, {})]
    events += [("resume", 2, {}), ("change", 7, second), ("resume", 7, {})]
    lines = [{"event": name, "step": step, "changes": changes} for name, step, changes in events]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, changes = read_recorded(str(tmp_path))
    assert list(rows) == [1] and changes == [(2, first), (7, second)]
    check_unbroken(changes, 0, 2, "x")
    check_unbroken(changes, 2, 7, "x")
    with pytest.raises(UserError, match="x: the run went on from step 2 with steps: 3 -> 6; ask for 2 at most"):
        check_unbroken(changes, 0, 3, "x")
    check_unbroken([(2, {"log.every_steps": [1, 2], "mesh.fsdp": [8, 1], "eval.batch_size": [8, 4]})], 0, 3, "x")
    with pytest.raises(UserError, match="the content of its data changed after step 5; step 5 had other data"):
        run_at(str(tmp_path), 5, [(5, {DATA: ["a", "b"]})])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rerun", "nowhere"], "no run directory 'nowhere'"),
        (["rerun", "nowhere", "--steps=0"], "--steps is 0"),
        (["replay", "nowhere", "--step=3"], "no run directory 'nowhere'"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, capsys):
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_help_begins_with_one_sentence(capsys):
    with pytest.raises(SystemExit):
        cli.main(["rerun", "--help"])
    assert "say whether every number is the same. " in " ".join(capsys.readouterr().out.split())
    assert all(text[-1].isalpha() for text in cli.COMMANDS.values())  # the full stop is put there


def test_a_step_trips_by_its_z_score_or_by_what_is_not_finite(tmp_path):
    rng = np.random.default_rng(0)
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        watch = Watch(None, None, None, 0, writer, threshold=6.0)
        for step in range(1, 101):
            values = {"loss": 3 + 0.1 * rng.normal(), "grad_norm": 1 + 0.1 * rng.normal()}
            writer.add(step, {f"train/{name}": value for name, value in values.items()})
            assert watch.why(step, values) == {}
        writer.add(101, {"train/loss": 9.0, "train/grad_norm": 1.0})
        why = watch.why(101, {"loss": 9.0, "grad_norm": 1.0})
        assert list(why) == ["loss"] and why["loss"] > 6
        assert watch.why(102, {"loss": 9.0, "grad_norm": 1.0}) == {}  # a step that wrote no row has no score
        writer.add(102, {"train/loss": 3.0, "train/grad_norm": float("nan")})
        assert watch.why(102, {"loss": 3.0, "grad_norm": float("nan")}) == {"grad_norm": "not finite"}
        watch.count = watch.most
        assert watch.why(102, {"loss": 3.0, "grad_norm": float("nan")}) == {}


def test_a_look_that_fails_ends_no_run(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.add(1, {"train/loss": float("inf"), "train/grad_norm": 1.0})
        workdir, state = Workdir(tmp_path), types.SimpleNamespace(step=3, all_params={})
        step = types.SimpleNamespace(batch_shardings=None)
        watch = Watch(workdir, types.SimpleNamespace(), step, 0, writer, 6.0, examine=lambda *_: 1 / 0)
        watch(1, {"loss": float("inf"), "grad_norm": 1.0}, state)
    record = json.loads((tmp_path / "spikes" / "step_00000001.json").read_text())
    assert record["why"] == {"loss": "not finite"} and record["weights_of_step"] == 3 and "Error" in record["error"]


def test_losses_of_rows_and_norms_of_layers_are_those_of_each_row_alone():
    config = tiny(dropout=0.2)
    objective = CausalLM(Transformer(config))
    step = build_train_step(
        objective, make_optimizer("adamw", 1e-3), objective.batch_spec(8, 12), mesh=make_mesh(devices=jax.devices()[:1])
    )
    params, batch = {"model": params_of(config)}, text_batch()
    shown = build_examine(step, seed=3)(params, batch, 7)

    def loss(weights):
        value, _, grads = gradients(
            objective,
            params,
            {"model": jax.tree.map(lambda x: None, params["model"])},
            {**batch, "target_weights": weights},
            step=jax.numpy.asarray(7),
            seed=3,
            microbatches=1,
        )
        return value, grads

    run = jax.jit(loss)
    for row in range(8):
        alone = np.zeros_like(batch["target_weights"])
        alone[row] = batch["target_weights"][row]
        assert shown["rows"]["weights/lm"][row] == pytest.approx(float(run(alone)[0]), rel=1e-4)
    value, grads = run(batch["target_weights"])
    assert shown["loss"] == pytest.approx(float(value), rel=1e-5)
    kernel = np.asarray(grads["model"]["layers"]["block_0"]["mlp"]["up"]["kernel"])
    expected = np.sqrt((kernel**2).sum((1, 2)))
    np.testing.assert_allclose(shown["gradient_norms"]["model/layers/block_0/mlp/up/kernel"], expected, rtol=1e-4)


def test_rows_of_a_mixture_are_told_by_part_and_term():
    objective = Mixture({"a": Bigram(), "b": Bigram()}, {"a": 1.0, "b": 2.0}, {"a": 6, "b": 2})
    batch = {
        "a": text_batch(rows=6, length=10, vocab=16),
        "b": text_batch(rows=2, length=10, vocab=16, seed=1),
    }
    spec, mesh = objective.batch_spec(8, 10), make_mesh(devices=jax.devices()[:1])
    step = build_train_step(objective, make_optimizer("adamw", 1e-3), spec, mesh=mesh)
    params = step.init(0).all_params
    shown = build_examine(step, seed=1)(params, batch, 0)
    keys = row_keys(1, 0, np.arange(6))
    weights = objective.weights(objective.prepare(batch, keys, jax.numpy.asarray(0)))
    assert set(shown["rows"]) == {"a/weights/lm", "a/weights/some", "b/weights/lm", "b/weights/some"}
    total = 0.0
    for name, coef in objective.coefs.items():
        part, _, term = name.partition("/")
        w = np.asarray(weights[name]).sum(1)
        total += coef * np.sum(shown["rows"][f"{part}/weights/{term}"] * w) / w.sum()
    assert shown["loss"] == pytest.approx(float(total), rel=1e-5)
