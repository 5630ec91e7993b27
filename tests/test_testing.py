"""The conformance kit passes what keeps the contract, and catches planted bugs, each by the property that broke."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import text_batch, tiny
from test_model import VARIANTS
from toys import SIZE, Bigram

from gpt_jax.losses import cross_entropy
from gpt_jax.model import Mask, Transformer
from gpt_jax.model.random import dropout, fold_name
from gpt_jax.objectives.causal_lm import CausalLM
from gpt_jax.objectives.compose import Mixture, Sum
from gpt_jax.testing import ContractBroken, check_objective
from gpt_jax.testing_models import check_module

MODEL = Transformer(tiny(dropout=0.2, num_layers=1))


def batch_of(rows=8, seed=0):
    return text_batch(rows=rows, length=6, seed=seed, vocab=SIZE, uneven=False)


def failures_of(objective, batch=None, **kwargs):
    with pytest.raises(ContractBroken) as caught:
        check_objective(objective, batch or batch_of(), **kwargs)
    failures = caught.value.report.failures
    assert failures and all(sentence in str(caught.value) for sentence in failures)
    return failures


def properties(failures):
    return {sentence.split(":")[0] for sentence in failures}


# --- what keeps the contract ------------------------------------------------------------------------------------------


def test_a_users_objective_that_keeps_the_contract_passes():
    report = check_objective(Bigram(), batch_of())
    assert report.failures == () and report.skipped == () and report.without_gradient == ()


@pytest.mark.parametrize(
    "options",
    [
        dict(z_loss=1e-3, label_smoothing=0.1, loss_chunk=16),
        dict(reweight="perplexity"),
        pytest.param(dict(reweight="excess"), marks=pytest.mark.slow),
    ],
    ids=["plain", "perplexity", "excess"],
)
def test_causal_lm_keeps_the_contract(options):
    report = check_objective(CausalLM(MODEL, **options), text_batch(documents=True, uneven=False))
    assert not report.skipped and not report.without_gradient


def test_compositions_keep_the_contract_also_inside_each_other():
    inner = Mixture({"x": Bigram(), "y": Bigram(rate=0.0)}, {"y": 0.5}, row_counts={"x": 8, "y": 16})
    outer = Mixture({"pair": Sum({"m": inner}, {"m": 2.0}), "z": Bigram()}, row_counts={"pair": 24, "z": 8})
    batch = {"pair": {"x": batch_of(8), "y": batch_of(16, 1)}, "z": batch_of(8, 2)}
    assert not check_objective(outer, batch).skipped
    assert set(outer.coefs) == {"pair/m/x/lm", "pair/m/x/some", "pair/m/y/lm", "pair/m/y/some", "z/lm", "z/some"}


@dataclasses.dataclass(frozen=True)
class Unused(Bigram):
    def init(self, key, batch):
        roots = super().init(key, batch)
        return roots | {"head": {"spare": roots["model"]["out"]}}


def test_parameters_without_gradient_are_named_and_what_cannot_be_checked_is_said():
    assert check_objective(Unused(), batch_of()).without_gradient == ("head/spare",)
    report = check_objective(Bigram(), batch_of(rows=7))
    assert [s.split(":")[0] for s in report.skipped] == ["micro-batches"]  # seven devices still divide it


# --- planted bugs -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MeanOfMeans(Bigram):
    """Divides by the weight of its own micro-batch."""

    def prepare(self, batch, keys, step):
        weights = {term: jnp.ones(len(batch["tokens"])) for term in ("lm", "some")}
        return {**batch, "mask": super().prepare(batch, keys, step)["weights"], "weights": weights}

    def loss(self, params, batch, keys, train):
        sums, metrics = super().loss(params, {**batch, "weights": batch["mask"]}, keys, train)
        rows = len(batch["tokens"])
        return {term: rows * sums[term] / jnp.sum(batch["mask"][term]) for term in sums}, metrics


def test_a_mean_of_means_is_caught_by_micro_batches():
    failures = failures_of(MeanOfMeans())
    assert properties(failures) <= {"micro-batches", "padding"} and "micro-batches" in properties(failures)


@dataclasses.dataclass(frozen=True)
class LeakingPadding(Bigram):
    """Trains on every target, whatever its weight."""

    def prepare(self, batch, keys, step):
        return super().prepare({**batch, "target_weights": jnp.ones_like(batch["target_weights"])}, keys, step)


@dataclasses.dataclass(frozen=True)
class CountsPadding(Bigram):
    """Divides by the number of targets, empty ones included."""

    def weights(self, batch):
        return {**batch["weights"], "lm": jnp.ones_like(batch["target_weights"])}


def test_leaking_padding_is_caught_by_padding():
    failures = failures_of(LeakingPadding())
    assert properties(failures) == {"padding"}
    assert "what stands where the weight is 0 changes loss or gradient" in failures[0]


def test_padding_that_counts_in_the_mean_is_caught_by_padding():
    failures = failures_of(CountsPadding())
    assert properties(failures) == {"padding"}
    assert failures == tuple(f for f in failures if "rows of weight 0 change the term 'lm'" in f)


@dataclasses.dataclass(frozen=True)
class SharedKey(Bigram):
    """Draws the dropout of all rows under the first row's key."""

    def token_losses(self, params, batch, keys):
        x = params["model"]["table"][batch["tokens"]]
        shared = jnp.broadcast_to(keys[:1], keys.shape)
        return cross_entropy(dropout(x, 0.25, fold_name(shared, "d")) @ params["model"]["out"], batch["targets"])


@dataclasses.dataclass(frozen=True)
class KeyOfPlace(Bigram):
    """Keys the mask of a row by its place in the micro-batch."""

    def token_losses(self, params, batch, keys):
        x = params["model"]["table"][batch["tokens"]]
        places = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.arange(len(x)))
        return cross_entropy(dropout(x, 0.25, places) @ params["model"]["out"], batch["targets"])


@dataclasses.dataclass(frozen=True)
class KeyOfPlaceInPrepare(Bigram):
    """The same in `prepare`, which sees the whole batch: micro-batches agree all the same."""

    def prepare(self, batch, keys, step):
        places = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.arange(keys.shape[0]))
        return super().prepare(batch, places, step)


@pytest.mark.parametrize("bug", [SharedKey, KeyOfPlace, KeyOfPlaceInPrepare])
def test_draws_that_are_not_keyed_by_the_row_are_caught_by_row_keys(bug):
    found = properties(failures_of(bug()))
    assert "row keys" in found
    assert found <= {"row keys", "micro-batches", "padding"}
    assert (bug is KeyOfPlaceInPrepare) == ("micro-batches" not in found)


@dataclasses.dataclass(frozen=True)
class Drifting(Bigram):
    """Draws outside jax.random: one number for each time it is traced."""

    def loss(self, params, batch, keys, train):
        sums, metrics = super().loss(params, batch, keys, train)
        return sums | {"lm": sums["lm"] * np.random.uniform(0.5, 1.0)}, metrics


class Counter:
    calls = itertools.count()


@dataclasses.dataclass(frozen=True)
class Stateful(Bigram):
    """Is not the same function twice: its dropout grows with every call."""

    def loss(self, params, batch, keys, train):
        rate = 0.1 + 0.01 * (next(Counter.calls) % 50)
        return Bigram(rate=rate).loss(params, batch, keys, train)


@pytest.mark.parametrize("bug", [Drifting, Stateful])
def test_what_differs_between_traces_is_caught_by_determinism(bug):
    failures = failures_of(bug())
    assert "deterministic" in properties(failures)
    assert any("traced a second time" in sentence for sentence in failures)


@dataclasses.dataclass(frozen=True)
class Trimming(Bigram):
    """Cuts the batch to its longest row, as collators do: another shape for each batch."""

    def prepare(self, batch, keys, step):
        longest = int(jnp.max(jnp.sum(batch["target_weights"] > 0, axis=1)))
        return super().prepare({name: x[:, :longest] for name, x in batch.items()}, keys, step)


def test_a_prepare_that_recompiles_is_caught_by_one_compilation():
    failures = failures_of(Trimming())
    assert properties(failures) == {"one compilation"} and "`prepare` asks for the value of an array" in failures[0]


def test_a_schedule_that_asks_for_the_step_is_caught_by_one_compilation():
    failures = failures_of(Bigram({"lm": 1.0, "some": lambda step: 1.0 if step < 10 else 0.0}))
    assert properties(failures) == {"one compilation"} and "schedule" in failures[0]


@dataclasses.dataclass(frozen=True)
class Entangled(Bigram):
    """Numbers its draws by the terms that are on: without 'some', 'lm' gets another draw."""

    def loss(self, params, batch, keys, train):
        on = [term for term, coef in self.coefs.items() if callable(coef) or coef]
        return super().loss(params, batch, fold_name(keys, str(on.index("lm")) if "lm" in on else "-"), train)


def test_terms_that_share_a_sequence_of_keys_are_caught_by_coefficients():
    failures = failures_of(Entangled({"some": 0.5, "lm": 1.0}))
    assert properties(failures) == {"coefficients"}
    assert "0 for 'some' changes the value of 'lm'" in failures[0]


@dataclasses.dataclass(frozen=True)
class NotFinite(Bigram):
    def loss(self, params, batch, keys, train):
        sums, metrics = super().loss(params, batch, keys, train)
        return sums | {"lm": sums["lm"] + jnp.sqrt(0.0 * jnp.sum(params["model"]["out"]))}, metrics


def test_a_gradient_that_is_not_finite_is_caught_and_named():
    assert failures_of(NotFinite()) == ("finite: the gradient is not, in model/out.",)


@dataclasses.dataclass(frozen=True)
class ManyBugs(LeakingPadding):
    def loss(self, params, batch, keys, train):
        return KeyOfPlace.loss(KeyOfPlace(), params, batch, keys, train)


def test_every_broken_property_is_told_not_only_the_first():
    assert {"padding", "row keys", "micro-batches"} <= properties(failures_of(ManyBugs()))


# --- modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_the_model_keeps_its_promises(name):
    report = check_module(tiny(**VARIANTS[name]))
    assert report.failures == () and report.skipped == ()


class Peeking(Transformer):
    """Every token sees the next one."""

    def __call__(self, tokens, *, mask=None, cache=None, **kwargs):
        mask = mask or Mask()
        if cache is None:
            two = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < 2, tokens.shape)
            mask = mask.replace(kind="prefix", prefix_BxT=two)
        return super().__call__(tokens, mask=mask, cache=cache, **kwargs)


class Mingling(Transformer):
    """Forgets the documents, as some fast attentions do."""

    def __call__(self, tokens, *, mask=None, **kwargs):
        return super().__call__(tokens, **kwargs)


class Restarting(Transformer):
    """Keeps positions but not in a packed row."""

    def __call__(self, tokens, *, mask=None, positions=None, cache=None, **kwargs):
        positions = positions if cache is not None else None
        return super().__call__(tokens, mask=mask, positions=positions, cache=cache, **kwargs)


class Forgetful(Transformer):
    """Decodes every token as if it stood at position 0."""

    def __call__(self, tokens, *, positions=None, cache=None, **kwargs):
        out = super().__call__(tokens, positions=positions, cache=cache, **kwargs)
        if cache is None or positions is not None:
            return out
        return out.replace(cache=out.cache.replace(positions_BxS=jnp.minimum(out.cache.positions_BxS, 1)))


class Unpadded(Transformer):
    """Attends to the padding on the left of a prompt."""

    def __call__(self, tokens, *, positions=None, cache=None, **kwargs):
        positions = jnp.maximum(positions, 0) if cache is not None and positions is not None else positions
        return super().__call__(tokens, positions=positions, cache=cache, **kwargs)


@pytest.mark.parametrize(
    ("bug", "sentences"),
    [
        (Peeking, {"causality: changing the tokens from 1 on"}),
        (Mingling, {"packed: a packed document is not what it is alone", "packed: another document in front"}),
        (Restarting, {"packed: a packed document is not what it is alone"}),
        (Forgetful, {"cached: decoding with the cache"}),
        (Unpadded, {"cached: a prompt padded on the left"}),
    ],
)
def test_a_module_that_breaks_a_promise_is_caught_by_that_promise(bug, sentences):
    with pytest.raises(ContractBroken) as caught:
        check_module(bug(tiny(num_layers=1)))
    failures = caught.value.report.failures
    allowed = {s.split(":")[0] for s in sentences} | ({"cached", "packed"} if bug is Peeking else set())
    assert properties(failures) <= allowed, failures
    for sentence in sentences:
        assert any(f.startswith(sentence) for f in failures), failures
