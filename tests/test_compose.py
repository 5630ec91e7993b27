"""Mixture and Sum: terms named child/term, shared roots, own keys; objectives by name and by import path."""

import dataclasses
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import assert_trees_equal, relative, text_batch, tiny
from toys import SIZE, Bigram

from gpt_jax.cli import main
from gpt_jax.data.formats import TaskInfo
from gpt_jax.errors import UserError
from gpt_jax.evaluate import evaluate
from gpt_jax.model import Transformer
from gpt_jax.objectives.base import (
    REGISTRY,
    Host,
    Setting,
    build_objective,
    describe_options,
    objective_class,
    rows_of,
)
from gpt_jax.objectives.causal_lm import CausalLM
from gpt_jax.objectives.classify import Classify
from gpt_jax.objectives.compose import Mixture, Sum
from gpt_jax.step import gradients, row_keys

SETTING = Setting(model=tiny(), steps=50, batch_size=8, context_length=12, specials={"eot": 3, "mask": 36})
TEXT = {"name": "causal_lm"}
MIXED = {"name": "mixture", "tasks": {"text": TEXT}}


def batch_of(seed=0, rows=8):
    return text_batch(rows=rows, seed=seed, vocab=SIZE)


def params_of(objective, batch, seed=0):
    boxed = objective.init(jax.random.key(seed), jax.tree.map(lambda x: x[:1], batch))
    return jax.tree.map(np.asarray, nn.unbox(boxed))


def run(objective, batch, params=None, step=3):
    """(loss, metrics, gradient) through the train step's own function."""
    params = params or params_of(objective, batch)
    frozen = jax.tree.map(lambda x: None, params)
    out = jax.jit(lambda p, b: gradients(objective, p, frozen, b, step=jnp.int32(step), seed=0, microbatches=1))
    return jax.device_get(out(params, batch))


def test_a_sum_is_the_weighted_sum_of_its_children_on_one_batch_with_shared_parameters():
    batch = batch_of()
    a, b = Bigram({"lm": 1.0, "some": 0.0}, rate=0.0), Bigram({"lm": 0.0, "some": 4.0}, rate=0.0)
    both = Sum({"a": a, "b": b}, {"a": 3.0, "b": 0.25})
    params = params_of(both, batch)
    assert_trees_equal(params, params_of(a, batch))  # one root, "model"
    assert both.coefs == {"a/lm": 3.0, "a/some": 0.0, "b/lm": 0.0, "b/some": 1.0}
    loss, metrics, grads = run(both, batch, params)
    assert float(loss) == pytest.approx(3 * metrics["loss/a/lm"] + metrics["loss/b/some"], rel=1e-6)
    assert {"a/nll", "b/nll"} <= set(metrics) and "loss/a/some" not in metrics
    only_a, only_b = run(Sum({"a": a}), batch, params), run(Sum({"b": b}), batch, params)
    expected = jax.tree.map(lambda x, y: 3 * x + 0.25 * y, only_a[2], only_b[2])
    assert relative(grads, expected) < 1e-6


def test_a_childs_draws_depend_on_its_name_and_not_on_its_siblings():
    batch = batch_of()
    params = params_of(Bigram(), batch)
    alone = run(Sum({"a": Bigram()}), batch, params)[1]
    pair = run(Sum({"first": Bigram(), "a": Bigram()}), batch, params)[1]
    for term in ("loss/a/lm", "loss/a/some", "a/nll"):
        assert pair[term] == alone[term]
    assert pair["loss/first/some"] != pair["loss/a/some"]  # siblings alike but for the name draw for themselves
    beside = {"a": batch, "other": batch_of(1, rows=16)}
    mixed = run(Mixture({"other": Bigram(), "a": Bigram()}, row_counts={"other": 16, "a": 8}), beside, params)[1]
    assert mixed["loss/a/some"] == pytest.approx(float(alone["loss/a/some"]), rel=1e-6)


def test_a_mixture_gives_each_child_its_own_rows_and_divides_each_by_its_own_weight():
    batch = {"a": batch_of(0, rows=4), "b": batch_of(1, rows=8)}
    mixture = Mixture({"a": Bigram(rate=0.0), "b": Bigram(rate=0.0)}, {"b": 2.0}, row_counts={"a": 4, "b": 8})
    params = params_of(mixture, batch)
    loss, metrics, _ = run(mixture, batch, params)
    for name, part in batch.items():
        logits = (params["model"]["table"] @ params["model"]["out"])[part["tokens"]].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll = -np.take_along_axis(log_p, part["targets"][..., None], -1)[..., 0]
        by_hand = np.sum(nll * part["target_weights"]) / np.sum(part["target_weights"])
        assert metrics[f"loss/{name}/lm"] == pytest.approx(by_hand, rel=1e-5)
    terms = [metrics[f"loss/{n}"] for n in ("a/lm", "a/some", "b/lm", "b/some")]
    assert float(loss) == pytest.approx(np.dot([1, 0.5, 2, 1], terms), rel=1e-6)
    assert mixture.batch_spec(12, 12)["b"]["tokens"].shape == (8, 12)
    assert mixture.batch_spec(24, 12)["a"]["tokens"].shape == (8, 12)


def test_schedules_of_coefficients_are_multiplied_by_the_childs():
    child = Bigram({"lm": 1.0, "some": lambda step: 0.5 * step})
    coefs = Sum({"a": child}, {"a": 3.0}).coefs
    assert coefs["a/lm"] == 3.0 and coefs["a/some"](4) == 6.0
    two = Sum({"a": child, "b": Bigram({"lm": 1.0, "some": lambda step: step})}, {"b": 10.0}).coefs
    assert (two["a/some"](2), two["b/some"](2)) == (1.0, 20.0)  # each its own, not the last one's


def test_roots_that_are_shared_must_be_the_same_tree():
    @dataclasses.dataclass(frozen=True)
    class Wider(Bigram):
        def init(self, key, batch):
            leaf = nn.Partitioned(jnp.zeros((SIZE, 2 * SIZE)), ("vocab", "embed"))
            return {"model": super().init(key, batch)["model"] | {"table": leaf}}

    with pytest.raises(UserError, match="objective 'b' shares the root 'model', but its parameters differ"):
        params_of(Sum({"a": Bigram(), "b": Wider()}), batch_of())


HOST = Host({"eot": 0, "sep": 1, "cls": 2}, 16, 4)


@pytest.mark.parametrize("name", ["supervised", "classify"])
def test_terms_of_a_sum_share_rows_that_are_equal(name):
    alone = rows_of({"name": name}, HOST)
    terms = {"a": {"name": name}, "b": {"name": name, "coef": 0.5}}
    assert rows_of({"name": "sum", "terms": terms}, HOST) == alone
    assert rows_of({"name": "sum", "terms": terms | {"c": {"name": "toys:Bigram"}}}, HOST) == alone
    with pytest.raises(UserError, match="the terms of a sum share one batch, but their rows differ"):
        rows_of({"name": "sum", "terms": terms | {"c": {"name": "tag"}}}, HOST)


def test_a_sum_predicts_what_its_first_term_that_can_does():
    class Says(Bigram):
        def predict(self, params, batch):
            return {"label": batch["tokens"] + params}

    both = Sum({"a": Bigram(), "b": Says(), "c": Says()})
    assert both.predict(1, {"tokens": 2}) == {"label": 3}


def test_each_child_of_a_sum_that_reports_nll_has_perplexity_and_bits_per_byte():
    class Text:
        num_batches, bytes = 2, 30

        def spec(self):
            return {"tokens": None}

        def batch_size(self, step):
            return 4

        def rows(self, step, rows):
            return {"tokens": np.zeros((4, 3), np.int32)}

        def bytes_in(self, batches):
            return self.bytes

        def unk_nats_in(self, batches):
            return 2.0

    both = Sum({"a": Bigram(), "b": Bigram()})
    measured = {"a/nll": (10.0, 12.0), "b/nll": (20.0, 12.0), "b/mlm_nll": (1.0, 1.0)}  # of each of the two batches
    found = evaluate(both, lambda params, batch, first: measured, None, Text(), None)
    assert found["a/bits_per_byte"] == pytest.approx(22 / math.log(2) / 30)
    assert found["b/bits_per_byte"] == pytest.approx(42 / math.log(2) / 30)
    assert found["b/perplexity"] == pytest.approx(math.exp(40 / 24))
    assert {name for name in found if name.endswith("bits_per_byte")} == {"a/bits_per_byte", "b/bits_per_byte"}


def labelled(*tasks):
    """A classifier of 16 tokens' model, of tasks {name: labels}."""
    infos = tuple(TaskInfo(i, task, labels) for i, (task, labels) in enumerate(tasks))
    return Classify(Transformer(tiny(num_layers=1)), infos)


@pytest.mark.parametrize("composition", [Sum, Mixture])
def test_a_head_is_shared_by_objectives_of_the_same_tasks_alone(composition):
    a, b = ("moods", ("glad", "sad")), ("facts", ("true", "false"))
    batch = {"tokens": jnp.zeros((2, 4), jnp.int32)}

    def roots(**children):
        both = composition(children)
        given = batch if composition is Sum else dict.fromkeys(children, batch)
        return jax.eval_shape(lambda: both.init(jax.random.key(0), given))

    assert roots(x=labelled(a, b), y=labelled(a, b)).keys() == {"model", "classifier"}
    for other in (labelled(b), labelled((a[0], ("sad", "glad"))), labelled(a, b), Sum({"z": labelled(b)})):
        with pytest.raises(UserError, match=r"'x' \(moods\) and 'y' \(.*\) would share the head 'classifier'") as error:
            roots(x=labelled(a), y=other)
        assert "\n" not in str(error.value)


def test_frozen_and_batch_terms_are_those_of_the_children():
    class Fixed(Bigram):
        frozen = ("reference/.*",)
        batch_terms = frozenset({"some"})

    both = Sum({"a": Bigram(), "b": Fixed()})
    assert both.frozen == ("reference/.*",) and both.batch_terms == {"b/some"}


def test_scores_of_the_children_that_need_them_reach_their_own_weights():
    model = Transformer(tiny(num_layers=1))
    plain, tilted = CausalLM(model), CausalLM(model, reweight="perplexity", clip=())
    batch = text_batch()
    both = Sum({"plain": plain, "tilted": tilted})
    params = params_of(both, batch)
    metrics = run(both, batch, params)[1]
    assert both.needs_scores and not Sum({"plain": plain}).needs_scores
    assert metrics["loss/plain/lm"] == pytest.approx(float(run(plain, batch, params)[1]["loss/lm"]), rel=1e-6)
    assert metrics["loss/tilted/lm"] == pytest.approx(float(run(tilted, batch, params)[1]["loss/lm"]), rel=1e-6)
    assert metrics["loss/tilted/lm"] > metrics["loss/plain/lm"]  # the harder samples weigh more


def test_keys_of_a_childs_rows_are_the_same_in_every_micro_batch():
    mixture = Mixture({"a": Bigram(), "b": Bigram()}, row_counts={"a": 4, "b": 8})
    keys = row_keys(0, 3, jnp.arange(8))
    batch = {"a": batch_of(0, rows=4), "b": batch_of(1)}
    whole = mixture._keys(mixture.children["a"], batch["a"], keys, "a")
    pieces = [
        mixture._keys(mixture.children["a"], jax.tree.map(lambda x, j=j: x[j::2], batch["a"]), keys[j::2], "a")
        for j in range(2)
    ]
    data = jax.random.key_data
    assert (data(whole)[0::2] == data(pieces[0])).all() and (data(whole)[1::2] == data(pieces[1])).all()


# --- by name ----------------------------------------------------------------------------------------------------------


def test_every_registered_objective_can_be_imported_and_described():
    for name in REGISTRY:
        assert objective_class(name).__name__
        lines = describe_options({"name": name}).splitlines()
        assert lines and all("  # " in line for line in lines)


def test_objectives_are_built_by_name_or_import_path_with_their_options():
    built = build_objective({"name": "causal_lm", "z_loss": 0.5}, SETTING)
    assert isinstance(built, CausalLM) and built.z_loss == 0.5 and built.model.config == SETTING.model
    assert built.alpha_warmup_steps == 5  # a tenth of the run
    own = build_objective({"name": "toys:Bigram", "rate": 0.5}, SETTING)
    assert isinstance(own, Bigram) and own.rate == 0.5
    assert own.coefs == {"lm": 1.0, "some": 0.5}


def test_an_objective_of_the_current_folder_is_found_and_its_files_hide_no_others(tmp_path, monkeypatch, capsys):
    own = "from gpt_jax.objectives.causal_lm import CausalLM\nimport graphlib\nclass Mine(CausalLM): pass\n"
    (tmp_path / "objective_of_mine.py").write_text(own)
    (tmp_path / "graphlib.py").write_text("raise RuntimeError('not the one of the standard library')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "graphlib", raising=False)
    name = "--config.objective={'name': 'objective_of_mine:Mine'}"
    assert main(["train", "--config=causal_lm", "--print-config", name]) == 0
    assert "objective.z_loss = " in capsys.readouterr().out


def test_compositions_are_built_from_nested_tables():
    spec = {
        "name": "mixture",
        "tasks": {
            "text": {"name": "causal_lm", "rows": 6},
            "toy": {
                "name": "sum",
                "rows": 2,
                "coef": 3.0,
                "terms": {"x": {"name": "toys:Bigram"}, "y": {"name": "toys:Bigram", "coef": 2.0}},
            },
        },
    }
    mixture = build_objective(spec, SETTING)
    assert mixture.coefs == {
        "text/lm": 1.0,
        "toy/x/lm": 3.0,
        "toy/x/some": 1.5,
        "toy/y/lm": 6.0,
        "toy/y/some": 3.0,
    }
    assert mixture.batch_spec(8, 12)["text"]["tokens"].shape == (6, 12)
    assert mixture.batch_spec(8, 12)["toy"]["tokens"].shape == (2, 12)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "causal_ml"}, r"objective\.name is 'causal_ml' \(did you mean 'causal_lm'\?\)"),
        ({"name": "causal_lm", "z_los": 1.0}, r"'objective\.z_los' \(did you mean 'z_loss'\?\)"),
        ({"z_loss": 1.0}, "the objective has no 'name'"),
        ({"name": "nowhere:Thing"}, "cannot import 'nowhere:Thing'"),
        ({"name": "toys:Bigrm"}, "cannot import 'toys:Bigrm'"),
        ({"name": "toys:Bigram", "rat": 0.1}, r"'objective\.rat' \(did you mean 'rate'\?\); Bigram takes"),
        ({"name": "causal_lm", "reweight": "perplex"}, r"objective\.reweight is 'perplex' \(did you mean"),
        ({"name": "mixture"}, "objective.tasks is empty"),
        ({"name": "sum"}, "objective.terms is empty"),
        ({"name": "mixture", "tasks": {"a": {"name": "causal_lm", "rows": 7}}}, "and sum to batch_size=8"),
        ({"name": "sum", "terms": {"a": {"name": "causal_lm", "aplha": 1.0}}}, r"did you mean 'alpha'"),
        ({"name": "sum", "terms": {"a": "causal_lm"}}, r"objective\.terms\.a is 'causal_lm'; it takes a table"),
        ({"name": "sum", "terms": {"a": TEXT | {"coef": "2"}}}, r"objective\.terms\.a\.coef is '2'; .* number of 0 or"),
        ({"name": "sum", "terms": {"a": TEXT | {"coef": True}}}, r"objective\.terms\.a\.coef is True"),
        ({"name": "sum", "terms": {"a": MIXED}}, r"objective\.terms\.a is a mixture.*the terms of a sum share one"),
        ({"name": "sum", "terms": {"a": {"name": "policy_gradient"}}}, r"objective\.terms\.a is a policy_gradient"),
        ({"name": "mixture", "tasks": {"a": "causal_lm"}}, r"objective\.tasks\.a is 'causal_lm'; it takes a table"),
        ({"name": "mixture", "tasks": {"a": TEXT | {"rows": "8"}}}, r"objective\.tasks\.a\.rows is '8'.*whole number"),
        ({"name": "mixture", "tasks": {"a": TEXT | {"rows": -8}}}, r"objective\.tasks\.a\.rows is -8; .* at least 1"),
        ({"name": "mixture", "tasks": {"a": TEXT | {"coef": -1.0}}}, r"objective\.tasks\.a\.coef is -1\.0"),
        ({"name": "mixture", "tasks": {"a": TEXT | {"data": "x.txt"}}}, r"objective\.tasks\.a\.data is 'x\.txt'"),
        (TEXT | {"coefs": {"lm": "1"}}, r"objective\.coefs\['lm'\] is '1'"),
        (TEXT | {"coefs": {"lm": -1.0}}, r"objective\.coefs\['lm'\] is -1\.0"),
        (TEXT | {"coefs": {"lm": math.inf}}, r"objective\.coefs\['lm'\] is inf"),
        (TEXT | {"alpha": math.nan}, r"objective\.alpha is nan; it takes a number"),
        ({"name": "toys:Bigram", "rate": "0.1"}, r"objective\.rate is '0\.1'; it takes a number"),
        ({"name": "policy_gradient", "clip": "0.2"}, r"objective\.clip is '0\.2'; it takes a number"),
        ({"name": "policy_gradient", "std": 1}, r"objective\.std is 1; it takes True or False"),
        (
            {"name": "denoising", "denoisers": (("r", "3", 0.15),)},
            r"objective\.denoisers has \('r', '3', 0\.15, 1\.0\)",
        ),
        ({"name": "denoising", "denoisers": ("r", 3, 0.15)}, r"denoisers is \('r', 3, 0\.15\); it takes a tuple of"),
        ({"name": "distillation", "teacher": {"d_model": "x"}}, r"objective\.teacher\.d_model is 'x'; .* whole number"),
        ({"name": "distillation", "teacher": {"head_dims": 4}}, r"teacher\.head_dims is 4; .* tuple of whole numbers"),
        ({"name": "replaced_token", "generator": {"d_model": 8.5}}, r"objective\.generator\.d_model is 8\.5"),
    ],
)
def test_mistakes_are_one_line_naming_the_closest_name(spec, message):
    with pytest.raises(UserError, match=message) as error:
        build_objective(spec, SETTING)
    assert "\n" not in str(error.value)


NAN = float("nan")
OUT_OF_RANGE = {
    "causal_lm": [("gamma", -1.0), ("gamma", NAN), ("alpha_warmup_steps", -5)],
    "supervised": [("label_smoothing", 2.0), ("label_smoothing", NAN), ("max_new", 0), ("loss_chunk", -1)],
    "dialogue": [("label_smoothing", 1.0), ("max_new", -1)],
    **{name: [("head_dropout", x) for x in (1.0, -0.1, NAN)] for name in ("classify", "tag", "span_qa")},
    "multiple_choice": [("head_dropout", 1.0)],
    "dpo": [("beta", NAN)],
    "distillation": [("temperature", NAN)],
    "masked_lm": [("edit_gamma", NAN), ("shares", (0.8, NAN, 0.1))],
    "replaced_token": [("temperature", NAN)],
}


@pytest.mark.parametrize(
    ("name", "option", "value"), [(name, *pair) for name, pairs in OUT_OF_RANGE.items() for pair in pairs]
)
def test_a_number_out_of_range_is_refused_in_one_line(name, option, value):
    own = {"mask_token": 3} if name in ("masked_lm", "replaced_token") else {}
    with pytest.raises(UserError, match=rf"^objective\.{option} is {re.escape(repr(value))}[; ]") as error:
        objective_class(name)(model=Transformer(SETTING.model), **own, **{option: value})
    assert "\n" not in str(error.value)


def test_options_that_may_be_none_and_coefficients_that_are_functions_are_taken():
    coefs = {"lm": lambda step: 0.5 * step}
    assert build_objective({"name": "causal_lm", "coefs": coefs}, SETTING).coefs == coefs
    assert build_objective({"name": "policy_gradient", "clip": None, "std": None}, SETTING).clip == 0
    assert build_objective({"name": "sum", "terms": {"a": TEXT | {"coef": 0}}}, SETTING).coefs == {"a/lm": 0}
