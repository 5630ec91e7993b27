"""The conformance kit passes our objectives and catches planted bugs, each by the property that broke."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import VOCAB, text_batch, tiny

from gpt_jax.errors import UserError
from gpt_jax.model import Transformer
from gpt_jax.model.random import fold_name
from gpt_jax.objectives.base import REGISTRY, Setting, build_objective
from gpt_jax.objectives.causal_lm import CausalLM
from gpt_jax.objectives.compose import Mixture, Sum
from gpt_jax.testing import ContractBroken, check_module, check_objective

MODEL = Transformer(tiny(dropout=0.2, num_layers=1))


def batch():
    return text_batch(rows=8, uneven=False)


def test_causal_lm_keeps_the_contract():
    assert not check_objective(CausalLM(MODEL), batch()).skipped


@pytest.mark.slow
@pytest.mark.parametrize("reweight", ["perplexity", "excess", "focal", "literal"])
def test_reweighted_causal_lm_keeps_the_contract(reweight):
    check_objective(CausalLM(MODEL, reweight=reweight, z_loss=1e-3, label_smoothing=0.1), batch())


@pytest.mark.slow
def test_a_sum_of_objectives_keeps_the_contract():
    both = Sum({"plain": CausalLM(MODEL), "smooth": CausalLM(MODEL, label_smoothing=0.2)}, {"smooth": 0.5})
    check_objective(both, batch())
    assert both.coefs == {"plain/lm": 1.0, "smooth/lm": 0.5}


@pytest.mark.slow
def test_a_mixture_of_objectives_keeps_the_contract():
    mixture = Mixture({"a": CausalLM(MODEL), "b": CausalLM(MODEL, z_loss=1e-3)}, rows={"a": 8, "b": 8})
    check_objective(mixture, {"a": batch(), "b": text_batch(rows=8, seed=5, uneven=False)})


@dataclasses.dataclass(frozen=True)
class MeanOfMeans(CausalLM):
    def prepare(self, batch, keys, step):
        return {**batch, "weights": {"lm": jnp.ones(batch["tokens"].shape[0])}}

    def loss(self, params, batch, keys, train):
        loss, _ = self._token_losses(params["model"], batch, None)
        mean = jnp.sum(batch["target_weights"] * loss) / jnp.sum(batch["target_weights"])
        return {"lm": mean * batch["tokens"].shape[0]}, {}


@dataclasses.dataclass(frozen=True)
class LeakingPadding(CausalLM):
    def prepare(self, batch, keys, step):
        return {**batch, "weights": {"lm": jnp.ones_like(batch["target_weights"])}}


@dataclasses.dataclass(frozen=True)
class SharedKey(CausalLM):
    def loss(self, params, batch, keys, train):
        noise = jax.random.uniform(fold_name(keys[0], "noise"), batch["targets"].shape)  # one key for all rows
        loss, _ = self._token_losses(params["model"], batch, None)
        return {"lm": jnp.sum(batch["weights"]["lm"] * loss * noise)}, {}


class Drifting(CausalLM):
    def loss(self, params, batch, keys, train):
        loss, _ = self._token_losses(params["model"], batch, None)
        return {"lm": jnp.sum(batch["weights"]["lm"] * loss) * np.random.uniform(0.5, 1.0)}, {}


@pytest.mark.parametrize(
    ("bug", "sentence"),
    [
        (MeanOfMeans, "micro-batches are not the whole batch"),
        (LeakingPadding, "padding leaks"),
        (SharedKey, "micro-batches are not the whole batch"),
        (Drifting, "not deterministic"),
    ],
)
def test_a_planted_bug_is_caught_by_its_property(bug, sentence):
    with pytest.raises(ContractBroken, match=sentence):
        check_objective(bug(MODEL), batch())


@pytest.mark.slow
def test_terms_that_share_a_key_are_caught_by_a_zero_coefficient():
    class Entangled(Sum):
        def loss(self, params, batch, keys, train):
            sums, metrics = super().loss(params, batch, keys, train)
            first, second = sums
            sums[second] = sums[second] * (1.0 if self_coefs()[first] else 2.0)
            return sums, metrics

    objective = Entangled({"a": CausalLM(MODEL), "b": CausalLM(MODEL)})
    current = {"coefs": objective.coefs}

    def self_coefs():
        return current["coefs"]

    import gpt_jax.testing as kit

    original = kit._WithCoefs

    def spying(inner, coefs):
        current["coefs"] = coefs
        return original(inner, coefs)

    kit._WithCoefs = spying
    try:
        with pytest.raises(ContractBroken, match="a coefficient of 0 for 'a/lm' changes the value of 'b/lm'"):
            check_objective(objective, batch())
    finally:
        kit._WithCoefs = original


@pytest.mark.parametrize("variant", [{}, {"positions": "rope", "num_kv_heads": 2}, {"positions": "alibi"}], ids=str)
def test_models_keep_their_promises(variant):
    check_module(tiny(**variant))


def test_every_registered_name_can_be_imported_and_unknown_ones_name_the_closest():
    from gpt_jax.objectives.base import objective_class

    for name in REGISTRY:
        assert objective_class(name).__name__
    with pytest.raises(UserError, match="did you mean 'causal_lm'"):
        objective_class("causal_ml")
    with pytest.raises(UserError, match="cannot import 'nowhere:Thing'"):
        objective_class("nowhere:Thing")


def test_an_objective_is_built_from_a_config_by_name_or_import_path():
    setting = Setting(model=tiny(), steps=50, batch_size=8)
    built = build_objective({"name": "causal_lm", "z_loss": 0.5}, setting)
    assert built.z_loss == 0.5 and built.alpha_warmup_steps == 5 and built.model.config.vocab_size == VOCAB
    own = build_objective({"name": "gpt_jax.objectives.causal_lm:CausalLM"}, setting)
    assert isinstance(own, CausalLM)
    with pytest.raises(UserError, match=r"objective.z_los.*did you mean 'z_loss'"):
        build_objective({"name": "causal_lm", "z_los": 0.5}, setting)
    mixed = build_objective(
        {
            "name": "mixture",
            "tasks": {"a": {"name": "causal_lm", "rows": 6}, "b": {"name": "causal_lm", "rows": 2, "coef": 3.0}},
        },
        setting,
    )
    assert mixed.coefs == {"a/lm": 1.0, "b/lm": 3.0}
    assert mixed.batch_spec(8, 12)["a"]["tokens"].shape == (6, 12)
    with pytest.raises(UserError, match=r"sum to 7 .* not to batch_size=8"):
        build_objective({"name": "mixture", "tasks": {"a": {"name": "causal_lm", "rows": 7}}}, setting)
