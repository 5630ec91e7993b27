"""Causal LM and its reweighting by perplexity, against NumPy and the closed forms of the module's docstring."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_trees_equal, params_of, relative, text_batch, tiny

from gpt_jax.errors import UserError
from gpt_jax.model import Mask, Transformer
from gpt_jax.objectives.base import check_spec
from gpt_jax.objectives.causal_lm import CausalLM, sample_weights
from gpt_jax.optim import make_optimizer
from gpt_jax.sharding import make_mesh
from gpt_jax.step import build_train_step, gradients

CONFIG = tiny(num_layers=1)
MODEL = Transformer(CONFIG)
PARAMS = {"model": params_of(CONFIG)}
REFERENCE = {"reference": params_of(CONFIG, seed=1)}


@functools.cache
def token_nll(documents):
    """Negative log-likelihoods [B, T] of `text_batch` by the NumPy model; NaN where a token is padding."""
    batch = text_batch(documents=documents)
    packing = dict(segments=batch["segment_ids"], positions=batch["positions"]) if documents else {}
    logits = oracle.forward(PARAMS["model"], CONFIG, batch["tokens"], **packing)
    lse = np.log(np.exp(logits).sum(-1))
    return lse - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]


def run(objective, batch, params=None, step=3):
    params = params or PARAMS
    frozen = jax.tree.map(lambda x: None, params)
    if objective.uses_reference:
        trained = {"model": params["model"], "reference": jax.tree.map(lambda x: None, REFERENCE["reference"])}
        frozen = {"model": jax.tree.map(lambda x: None, params["model"])} | REFERENCE
        params = trained
    fn = jax.jit(lambda p, b: gradients(objective, p, frozen, b, step=jnp.int32(step), seed=0, microbatches=1))
    return jax.device_get(fn(params, batch))


@functools.cache
def plain(documents=False):
    return run(CausalLM(MODEL), text_batch(documents=documents))


@pytest.mark.parametrize("documents", [False, True])
def test_the_loss_is_the_mean_nll_of_the_weighted_targets(documents):
    batch, (loss, metrics, _) = text_batch(documents=documents), plain(documents)
    weights = batch["target_weights"]
    expected = np.nansum(weights * token_nll(documents)) / weights.sum()
    assert loss == metrics["nll"] == metrics["loss/lm"]
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_smoothing_and_z_loss_change_the_loss_and_leave_the_nll():
    loss, metrics, _ = run(CausalLM(MODEL, label_smoothing=0.1, z_loss=0.01), text_batch())
    assert metrics["nll"] == pytest.approx(float(plain()[0]), rel=1e-6)
    assert abs(loss - metrics["nll"]) > 1e-3


@pytest.mark.parametrize("chunk", [7, 96])  # of 96 tokens
def test_chunks_of_the_vocabulary_layer_give_the_loss_and_gradient_of_the_whole(chunk):
    objective = CausalLM(MODEL, loss_chunk=chunk)
    loss, _, grads = run(objective, text_batch())
    assert float(loss) == pytest.approx(float(plain()[0]), rel=1e-6)
    assert relative(grads, plain()[2]) < 1e-5


def test_a_packed_document_has_the_loss_that_it_has_alone():
    batch = text_batch(documents=True, uneven=False)
    objective = CausalLM(MODEL)
    packed = run(objective, batch)
    total, count = 0.0, 0.0
    alone = jax.jit(
        lambda b: objective.loss(PARAMS, b | {"weights": {"lm": b["target_weights"]}}, None, False)[0]["lm"]
    )
    for row in range(8):
        for segment in (1, 2, 3):
            where = batch["segment_ids"][row] == segment
            n = int(where.sum())
            padded = {k: np.zeros((1, 12), v.dtype) for k, v in batch.items() if k not in ("segment_ids", "positions")}
            for name in padded:  # at the start of a row of its own, empty after it
                padded[name][0, :n] = batch[name][row][where]
            total, count = total + float(alone(padded)), count + n
    assert count == 96
    assert float(packed[0]) == pytest.approx(total / count, rel=1e-5)


# --- weights of samples -----------------------------------------------------------------------------------------------


def weights_of(nll, mask=None, segments=None, reference=None, step=10**6, **options):
    """`sample_weights` on made-up scores, [B, T]."""
    nll = np.asarray(nll, np.float32)
    mask = np.ones_like(nll) if mask is None else np.asarray(mask, np.float32)
    scores = {"nll": nll} | ({} if reference is None else {"reference_nll": np.asarray(reference, np.float32)})
    objective = CausalLM(MODEL, **options)
    return np.asarray(sample_weights(objective, jnp.asarray(mask), segments, scores, jnp.asarray(step)))


def ratios(means, counts, alpha):
    """r_i = e^{alpha l_i} sum(n) / sum_j n_j e^{alpha l_j}."""
    e = np.exp(alpha * np.asarray(means))
    return e * np.sum(counts) / np.sum(np.asarray(counts) * e)


def test_weights_are_powers_of_perplexity_with_mean_one_over_tokens():
    rng = np.random.default_rng(0)
    nll = rng.uniform(0, 5, (4, 6))
    mask = np.array([[1] * 6, [1] * 3 + [0] * 3, [0, 1, 0, 1, 0, 0], [0] * 6])
    counts = mask.sum(1)
    means = (nll * mask).sum(1) / np.maximum(counts, 1)
    got = weights_of(nll, mask, reweight="perplexity", alpha=0.7, clip=())
    expected = ratios(means[:3], counts[:3], 0.7)
    np.testing.assert_allclose(got[:3], np.broadcast_to(expected[:, None], (3, 6)), rtol=1e-5)
    assert np.sum(got * mask) == pytest.approx(mask.sum(), rel=1e-5)
    assert np.isfinite(got).all()  # also of a row without targets


def test_weights_do_not_change_when_all_perplexities_are_rescaled():
    nll = np.random.default_rng(0).uniform(0, 5, (4, 6))
    for options in (dict(reweight="perplexity"), dict(reweight="literal", tau=0.5)):
        scaled = nll + math.log(100.0)
        np.testing.assert_allclose(weights_of(scaled, **options), weights_of(nll, **options), rtol=2e-4)


@pytest.mark.parametrize(("alpha", "share"), [(0, 0.10), (0.25, 0.16), (0.5, 0.25), (1, 0.49), (2, 0.89)])
def test_noise_of_ten_percent_takes_the_published_share_of_the_weight(alpha, share):
    nll = np.full((10, 3), 2.0)
    nll[0] = math.log(64)
    got = weights_of(nll, reweight="perplexity", alpha=alpha, clip=())[:, 0]
    assert got[0] / got.sum() == pytest.approx(share, abs=0.005)
    # Beside a reference that finds the noise as hard, excess loss gives it its own tenth.
    excess = weights_of(nll, reference=nll, reweight="excess", alpha=alpha, clip=())[:, 0]
    assert excess[0] / excess.sum() == pytest.approx(0.10, abs=1e-6)


def test_weights_are_clipped():
    nll = np.full((10, 3), 2.0)
    nll[0], nll[1] = math.log(64), 0.0
    free = weights_of(nll, reweight="perplexity", alpha=2.0, clip=())[:, 0]
    got = weights_of(nll, reweight="perplexity", alpha=2.0, clip=(0.5, 2.0))[:, 0]
    np.testing.assert_allclose(got, np.clip(free, 0.5, 2.0), rtol=1e-6)
    assert got.max() == 2.0 and got.min() == 0.5


def test_negative_alpha_turns_away_from_what_is_hard():
    got = weights_of([[1.0], [3.0]], reweight="perplexity", alpha=-0.5, clip=())[:, 0]
    np.testing.assert_allclose(got, ratios([1.0, 3.0], [1, 1], -0.5), rtol=1e-5)
    assert got[0] > 1 > got[1]


def test_alpha_warms_up_linearly():
    nll = [[1.0], [3.0]]
    for step, factor in [(0, 0.1), (4, 0.5), (9, 1.0), (100, 1.0)]:
        got = weights_of(nll, step=step, reweight="perplexity", alpha=0.8, alpha_warmup_steps=10, clip=())[:, 0]
        np.testing.assert_allclose(got, ratios([1.0, 3.0], [1, 1], 0.8 * factor), rtol=1e-5)


def test_the_literal_softmax_of_perplexities_collapses_to_one_sample():
    nll = np.log(np.array([[10.0], [12.0], [14.0], [30.0]]))
    share = {tau: weights_of(nll, reweight="literal", tau=tau, clip=())[:, 0] / 4 for tau in (10.0, 1.0, 0.05)}
    z = (np.exp(nll[:, 0]) - 16.5) / np.std(np.exp(nll[:, 0]))
    for tau, got in share.items():
        np.testing.assert_allclose(got, np.exp(z / tau) / np.exp(z / tau).sum(), rtol=1e-4, atol=1e-7)
    assert share[0.05][3] > 0.999 and share[10.0].max() < 0.3


def test_focal_weights_are_per_token():
    nll = np.random.default_rng(0).uniform(0, 5, (2, 4))
    got = weights_of(nll, reweight="focal", gamma=2.0)
    np.testing.assert_allclose(got, (1 - np.exp(-nll)) ** 2, rtol=1e-4)
    assert np.isfinite(weights_of(np.zeros((1, 2)), reweight="focal", gamma=0.5)).all()


def test_excess_weights_are_powers_of_the_perplexity_over_the_references():
    rng = np.random.default_rng(0)
    nll, reference = rng.uniform(0, 5, (2, 5, 3))
    got = weights_of(nll, reference=reference, reweight="excess", alpha=0.5, clip=())[:, 0]
    np.testing.assert_allclose(got, ratios((nll - reference).mean(1), [3] * 5, 0.5), rtol=1e-5)


def test_a_band_keeps_samples_between_two_quantiles_of_the_reference():
    reference = np.arange(11.0)[:, None]
    got = weights_of(reference[::-1], reference=reference, band=(0.1, 0.9))[:, 0]
    np.testing.assert_array_equal(got, [0] + [1] * 9 + [0])
    both = weights_of(np.ones((11, 1)), reference=reference, band=(0.1, 0.9), reweight="perplexity")[:, 0]
    np.testing.assert_allclose(both, got)


def test_documents_are_the_samples_where_they_are_kept_apart():
    segments = np.array([[1, 1, 2, 2, 0], [1, 2, 2, 2, 2]])
    nll = np.array([[1.0, 3.0, 5.0, 5.0, 9.0], [0.5, 2.0, 2.0, 4.0, 4.0]])
    mask = (segments > 0).astype(float)
    got = weights_of(nll, mask, segments=jnp.asarray(segments), reweight="perplexity", alpha=0.5, clip=())
    r = ratios([2.0, 5.0, 0.5, 3.0], [2, 2, 1, 4], 0.5)
    expected = [[r[0], r[0], r[1], r[1]], [r[2], r[3], r[3], r[3], r[3]]]
    np.testing.assert_allclose(got[0, :4], expected[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-5)
    rows = weights_of(nll, mask, reweight="perplexity", alpha=0.5, clip=())
    assert len(set(rows[0])) == 1


# --- the gradient of the reweighted loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("alpha", [0.5, -0.7])
def test_the_gradient_is_that_of_the_tilted_risk(documents, alpha):
    batch = text_batch(documents=documents)
    objective = CausalLM(MODEL, reweight="perplexity", alpha=alpha, clip=())
    sample = np.broadcast_to(np.arange(8)[:, None], (8, 12))
    if documents:
        sample = sample * 4 + batch["segment_ids"]
    onehot = (sample[..., None] == np.unique(sample)).astype(np.float32) * batch["target_weights"][..., None]
    onehot = onehot[..., onehot.sum((0, 1)) > 0]
    n = onehot.sum((0, 1))

    def tilted_risk(params):
        kwargs = dict(mask=Mask(segments_BxT=batch["segment_ids"]), positions=batch["positions"]) if documents else {}
        logits = MODEL.apply({"params": params["model"]}, batch["tokens"], **kwargs).logits
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
        means = jnp.einsum("bt,bti->i", nll, onehot) / n
        return jax.nn.logsumexp(alpha * means, b=n / n.sum()) / alpha

    expected = jax.jit(jax.grad(tilted_risk))(PARAMS)
    _, _, grads = run(objective, batch)
    assert relative(grads, expected) < 1e-6 * 5
    assert relative(plain(documents)[2], expected) > 0.01


@pytest.mark.parametrize(
    "options",
    [dict(reweight="perplexity", alpha=0.0), dict(reweight="focal", gamma=0.0), dict(reweight="excess", alpha=0.0)],
    ids=lambda o: o["reweight"],
)
def test_without_exponent_every_reweighting_is_plain_cross_entropy(options):
    loss, _, grads = run(CausalLM(MODEL, **options), text_batch())
    assert float(loss) == pytest.approx(float(plain()[0]), rel=1e-6)
    assert relative(grads["model"], plain()[2]["model"]) < 1e-6


@pytest.mark.parametrize("reweight", ["perplexity", "literal", "focal", "excess"])
def test_the_loss_is_the_weighted_mean_and_the_weights_carry_no_gradient(reweight):
    batch = text_batch()
    objective = CausalLM(MODEL, reweight=reweight)
    loss, metrics, grads = run(objective, batch, step=10**6)
    scores = {"nll": token_nll(False)}
    if reweight == "excess":
        logits = oracle.forward(REFERENCE["reference"], CONFIG, batch["tokens"])
        chosen = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        scores["reference_nll"] = np.log(np.exp(logits).sum(-1)) - chosen
    weights = weights_of(
        scores["nll"], batch["target_weights"], reference=scores.get("reference_nll"), reweight=reweight
    )
    weights = weights * batch["target_weights"]
    assert float(loss) == pytest.approx(np.sum(weights * token_nll(False)) / weights.sum(), rel=1e-5)
    assert metrics["nll"] == pytest.approx(float(plain()[0]), rel=1e-6)  # the metric is never reweighted

    def fixed(params):
        logits = MODEL.apply({"params": params["model"]}, batch["tokens"]).logits
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
        return jnp.sum(weights * nll) / weights.sum()

    assert relative(grads["model"], jax.jit(jax.grad(fixed))(PARAMS)["model"]) < 2e-5


def test_the_reference_is_frozen_and_starts_as_the_model():
    objective = CausalLM(MODEL, reweight="excess")
    mesh = make_mesh(devices=jax.devices()[:1])
    step = build_train_step(objective, make_optimizer("adamw", 0.1), objective.batch_spec(8, 12), mesh=mesh)
    state = step.init(0)
    start = jax.tree.map(np.array, jax.device_get(state.all_params))
    assert_trees_equal(start["reference"], start["model"])
    state, _ = step(state, step.put(text_batch()))
    state, _ = step(state, step.put(text_batch(seed=1)))
    assert_trees_equal(jax.device_get(state.all_params["reference"]), start["reference"])
    assert relative(jax.device_get(state.all_params["model"]), start["model"]) > 0.01
    assert not jax.tree.leaves(state.params["reference"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(reweight="diversity"), r"objective\.reweight is 'diversity'"),
        (dict(reweight="perplexty"), r"did you mean 'perplexity'"),
        (dict(clip=(2.0, 0.5)), r"objective\.clip is \(2\.0, 0\.5\)"),
        (dict(clip=(0.5,)), r"objective\.clip is \(0\.5,\)"),
        (dict(band=(0.9, 0.1)), r"objective\.band is \(0\.9, 0\.1\)"),
        (dict(band=(10, 90)), r"objective\.band is \(10, 90\)"),
        (dict(tau=0.0), r"objective\.tau is 0\.0"),
        (dict(label_smoothing=1.5), r"objective\.label_smoothing is 1\.5"),
        (dict(loss_chunk=-1), r"objective\.loss_chunk is -1"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        CausalLM(MODEL, **options)
    assert "\n" not in str(error.value)


def test_dropout_is_on_in_training_only():
    objective = CausalLM(Transformer(tiny(num_layers=1, dropout=0.5)), reweight="perplexity")
    batch = text_batch() | {"weights": {"lm": text_batch()["target_weights"]}}
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(8))

    @jax.jit
    def all_three(params, batch):
        sums = [objective.loss(params, batch, keys, train)[0]["lm"] for train in (True, False)]
        return sums, objective.score(params, batch, keys)["nll"]

    (training, evaluation), nll = all_three(PARAMS, batch)
    expected = np.sum(batch["target_weights"] * token_nll(False))
    assert float(evaluation) == pytest.approx(expected, rel=1e-5)
    assert abs(float(training) - expected) > 0.01 * expected
    np.testing.assert_allclose(nll, token_nll(False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": "high"}, "objective.label_smoothing is 'high'; it takes a number"),
        ({"alpha_warmup_steps": 2.5}, "objective.alpha_warmup_steps is 2.5; it takes a whole number"),
        ({"alpha": True}, "objective.alpha is True; it takes a number"),
        ({"reweight": 3}, "objective.reweight is 3; it takes text"),
        ({"clip": 2}, "objective.clip is 2; it takes a tuple of numbers"),
        ({"band": ("low", 1)}, "objective.band is ('low', 1); it takes a tuple of numbers"),
        ({"coefs": 3.0}, "objective.coefs is 3.0; it takes a table"),
        ({"name": 5}, "objective.name is 5; it is a name or an import path"),
    ],
)
def test_an_option_of_another_type_is_one_sentence(options, message):
    with pytest.raises(UserError) as caught:
        check_spec({"name": "causal_lm", **options})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    check_spec({"name": "causal_lm", "label_smoothing": 0, "alpha": 1, "clip": (0, 2)})  # whole numbers are numbers
