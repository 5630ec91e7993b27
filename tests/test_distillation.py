"""Distillation: its divergence by hand, what it learns, what stays frozen, where the teacher's weights come from."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from scipy.special import log_softmax
from training import train

from gpt_jax.checkpoint import Checkpointer
from gpt_jax.checkpoint_parts import load_params
from gpt_jax.cli import main
from gpt_jax.config import resolve
from gpt_jax.errors import UserError
from gpt_jax.model import Transformer
from gpt_jax.objectives.distillation import Distillation, divergence
from gpt_jax.testing import check_objective
from gpt_jax.train import train as run_training

MODEL = Transformer(tiny(num_layers=1, d_model=16))
LARGER = {"num_layers": 2, "d_model": 24}


def batch_of(seed=0, rows=8, length=12):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, MODEL.config.vocab_size, (rows, length + 1)).astype(np.int32)
    weights = (rng.random((rows, length)) < 0.8).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "target_weights": weights}


def sums_of(objective, params, batch):
    keys = jax.random.split(jax.random.key(0), len(batch["tokens"]))
    prepared = objective.prepare(batch, keys, jnp.int32(0))
    return jax.jit(lambda p: objective.loss(p, prepared, keys, False))(params)


def test_the_contract_holds():
    check_objective(Distillation(MODEL, teacher=LARGER), batch_of())


def test_the_divergence_and_its_gradient_are_those_of_the_book():
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 5, 7)).astype(np.float32) * 3
    a, b = log_softmax(p, axis=-1), log_softmax(q, axis=-1)
    np.testing.assert_allclose(divergence(p, q), (np.exp(a) * (a - b)).sum(-1), rtol=1e-5)
    slope = jax.grad(lambda q: jnp.sum(divergence(p, q)))(q)
    np.testing.assert_allclose(slope, np.exp(b) - np.exp(a), atol=1e-6)


def test_the_terms_are_sums_over_weighted_tokens_at_the_temperature():
    objective, batch = Distillation(MODEL, teacher=LARGER, temperature=3.0), batch_of()
    params = objective.init(jax.random.key(1), batch)
    assert jax.tree.leaves(params["teacher"])[0].shape != jax.tree.leaves(params["model"])[0].shape
    student = np.asarray(MODEL.apply({"params": params["model"]}, batch["tokens"]).logits)
    teacher = np.asarray(objective.teacher_model.apply({"params": params["teacher"]}, batch["tokens"]).logits)
    student, teacher = (x[..., : MODEL.config.vocab_size].astype(np.float64) for x in (student, teacher))
    a, b = log_softmax(teacher / 3, axis=-1), log_softmax(student / 3, axis=-1)
    w = batch["target_weights"]
    sums, metrics = sums_of(objective, params, batch)
    assert sums["distill"] == pytest.approx(9 * (w * (np.exp(a) * (a - b)).sum(-1)).sum(), rel=1e-4)
    nll = -np.take_along_axis(log_softmax(student, axis=-1), batch["targets"][..., None], -1)[..., 0]
    assert sums["lm"] == pytest.approx((w * nll).sum(), rel=1e-5)
    same = (student.argmax(-1) == teacher.argmax(-1)) * w
    assert float(metrics["agreement"][0]) == pytest.approx(same.sum()) and float(metrics["agreement"][1]) == w.sum()


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    objective, batch = Distillation(MODEL, coefs={"distill": 1.0}), batch_of()
    params = objective.init(jax.random.key(1), batch)
    params["teacher"] = params["model"]
    keys = jax.random.split(jax.random.key(0), len(batch["tokens"]))
    prepared = objective.prepare(batch, keys, jnp.int32(0))
    value, slopes = jax.value_and_grad(lambda p: objective.loss(p, prepared, keys, True)[0]["distill"])(params)
    assert abs(float(value)) < 1e-3
    assert all(float(jnp.abs(x).max()) < 1e-3 for x in jax.tree.leaves(slopes["model"]))
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(slopes["teacher"]))


def test_a_student_comes_near_a_teacher_that_stays_as_it_is():
    objective = Distillation(MODEL, coefs={"distill": 1.0}, teacher=LARGER)
    batch = batch_of()
    state, rows = train(objective, [batch] * 60, rate=3e-2)
    first, _ = train(objective, [batch])
    assert rows[-1]["kl"] < 0.2 * rows[0]["kl"] and rows[-1]["agreement"] > rows[0]["agreement"]
    assert not jax.tree.leaves(state.params["teacher"]) and not jax.tree.leaves(state.frozen["model"])
    jax.tree.map(np.testing.assert_array_equal, state.frozen, first.frozen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"objective\.temperature is 0\.0; it must be above 0"),
        ({"teacher": {"num_layer": 2}}, r"a key of objective\.teacher is 'num_layer' \(did you mean 'num_layers'"),
        ({"teacher": {"vocab_size": 99}}, r"the teacher's vocab_size is 99 and the student's \d+; they must be equal"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, message):
    with pytest.raises(UserError, match=message):
        Distillation(MODEL, **options)


def test_a_run_takes_its_teacher_from_another_run_and_refuses_to_begin_without(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 40)
    options = [f"--config.data.path={text}", "--config.data.tokenizer.kind=byte", "--config.steps=2"]
    options += ["--config.batch_size=8", "--config.context_length=16", "--config.sample.prompts=()"]
    shape = ["--config.model.num_layers=1", "--config.model.d_model=16", "--config.model.num_heads=1"]
    larger = ["--config.model.num_layers=2", "--config.model.d_model=24", "--config.model.num_heads=1"]
    teacher, student = str(tmp_path / "teacher"), str(tmp_path / "student")
    assert main(["train", "--config=causal_lm", f"--workdir={teacher}", *options, *larger]) == 0
    own = ["train", "--config=causal_lm", f"--workdir={student}", *options, *shape, "--config.init.model=False"]
    own += ["--config.objective={'name': 'distillation', 'teacher': {'num_layers': 2, 'd_model': 24}}"]
    assert main(own) == 1
    assert "a frozen model, 'teacher', and no run gives 'teacher/" in capsys.readouterr().err
    own += [f"--config.init.from={teacher}", "--config.init.rename=(('^model/', 'teacher/'),)"]
    wrong = [*own, "--config.objective={'name': 'distillation', 'teacher': {'num_layers': 3, 'd_model': 24}}"]
    assert main(wrong) == 1
    assert "of the same shape" in capsys.readouterr().err
    assert main(own) == 0
    assert "valid/kl" in json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    kept, wanted = load_params(student)["teacher"], load_params(teacher)["model"]
    jax.tree.map(np.testing.assert_array_equal, kept, wanted)


def test_what_a_start_killed_before_its_first_checkpoint_froze_is_not_kept(tmp_path):
    """The teacher is stored at once, the first checkpoint comes later: another start has another teacher."""
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save_frozen({"teacher": {"w": jnp.zeros(3)}})
    checkpointer.save_frozen({"teacher": {"w": jnp.ones(3)}})  # within one run it is stored once
    abstract = {"teacher": {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}}
    assert float(checkpointer.restore_frozen(abstract)["teacher"]["w"].sum()) == 0
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    shape = {"num_layers": 1, "d_model": 16, "num_heads": 1}
    tree = {
        "steps": 1,
        "batch_size": 8,
        "context_length": 16,
        "model": shape,
        "data": {"path": str(tmp_path / "text.txt"), "tokenizer": {"kind": "byte"}},
        "sample": {"prompts": ()},
    }
    quiet = lambda line: None  # noqa: E731
    run_training(resolve(tree), str(tmp_path / "teacher"), log=quiet)
    init = {"from": str(tmp_path / "teacher"), "rename": (("^model/", "teacher/"),)}
    checkpointer.close()
    run_training(resolve(tree | {"objective": {"name": "distillation"}, "init": init}), str(tmp_path), log=quiet)
    kept, wanted = load_params(tmp_path)["teacher"], load_params(tmp_path / "teacher")["model"]
    jax.tree.map(np.testing.assert_array_equal, kept, wanted)
