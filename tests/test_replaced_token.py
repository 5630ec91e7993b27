"""Replaced-token detection: gradients between generator and discriminator, samples, labels, and what is learnt."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_trees_close, params_of, text_batch, tiny
from scipy.stats import chisquare

from gpt_jax.checkpoint import Checkpointer
from gpt_jax.checkpoint_parts import restore_subset
from gpt_jax.errors import UserError
from gpt_jax.eval_step import build_eval_step
from gpt_jax.hooks import strip
from gpt_jax.model import Transformer, count_parameters
from gpt_jax.objectives.base import Setting, build_objective
from gpt_jax.objectives.causal_lm import CausalLM
from gpt_jax.objectives.replaced_token import ReplacedToken, generator_config, gumbel_sample
from gpt_jax.optim import make_optimizer
from gpt_jax.sharding import make_mesh, unbox
from gpt_jax.step import build_train_step, gradients, row_keys
from gpt_jax.testing import check_objective

VOCAB, MASK, EOT = 37, 36, 3
CONFIG = tiny(num_layers=1, d_model=16, num_heads=4)
KEYS = row_keys(0, 3, jnp.arange(8))


def detection(config=CONFIG, **options):
    return ReplacedToken(
        Transformer(config), mask_token=MASK, specials=(EOT,), **{"rate": 0.4, "fraction": 0.5} | options
    )


def text(seed=0, **kwargs):
    return text_batch(vocab=VOCAB - 1, seed=seed, **kwargs)


@functools.cache
def parameters(share="embeddings"):
    """Parameters in general position: NumPy noise in the shapes of `init`."""
    objective = detection(share=share)
    shapes = unbox(jax.eval_shape(lambda key: objective.init(key, text()), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), shapes)


@functools.cache
def gradient(share="embeddings", **coefs):
    objective = detection(share=share, coefs=coefs)
    params = parameters(share)
    frozen = jax.tree.map(lambda x: None, params)
    run = jax.jit(lambda p, b: gradients(objective, p, frozen, b, step=jnp.int32(3), seed=0, microbatches=1))
    return jax.device_get(run(params, text()))


@functools.cache
def replaced(share="embeddings"):
    """The prepared batch of `text()` at step 3, the generator's logits and the text with its samples."""
    objective = detection(share=share)
    batch = objective.prepare(text(), KEYS, jnp.int32(3))
    return jax.device_get((batch, *jax.jit(lambda b: objective.replace(parameters(share), b, KEYS))(batch)))


# --- generator and discriminator --------------------------------------------------------------------------------------


def test_the_discriminators_loss_reaches_nothing_of_the_generator_but_the_shared_table():
    _, _, grads = gradient(mlm=0.0, rtd=1.0)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads["generator"]))
    assert (grads["model"]["embedding"] != 0).any() and (grads["rtd"]["score"]["kernel"] != 0).any()
    _, _, grads = gradient(mlm=1.0, rtd=0.0)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(grads["generator"]))
    shared = {"embedding", "position_embedding"}
    for name, tree in grads["model"].items():
        assert any((leaf != 0).any() for leaf in jax.tree.leaves(tree)) == (name in shared)


def test_the_shared_table_gets_the_weighted_sum_of_both_gradients():
    both, generator, discriminator = (gradient(mlm=m, rtd=r)[2] for m, r in ((1.0, 50.0), (1.0, 0.0), (0.0, 1.0)))
    for name in ("embedding", "position_embedding"):
        expected = generator["model"][name] + 50.0 * discriminator["model"][name]
        np.testing.assert_allclose(both["model"][name], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        assert (generator["model"][name] != 0).any() and (discriminator["model"][name] != 0).any()


def test_without_sharing_the_two_have_no_parameter_in_common():
    _, _, grads = gradient("none", mlm=1.0, rtd=0.0)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads["model"]))
    _, _, grads = gradient("none", mlm=0.0, rtd=1.0)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads["generator"]))
    assert parameters("none")["generator"]["embedding"].shape == (40, 8)
    assert "embedding" not in parameters()["generator"]


def test_losses_are_those_of_two_numpy_models():
    loss, metrics, _ = gradient(mlm=1.0, rtd=50.0)
    batch, logits, corrupted = replaced()
    params, config = parameters(), generator_config(CONFIG, 0.5)
    shared = {name: params["model"][name] for name in ("embedding", "position_embedding")}
    segments = (batch["target_weights"] > 0).astype(int)
    both = dict(kind="bidirectional", segments=segments)
    expected = oracle.forward(params["generator"] | shared, config, batch["inputs"], **both)
    expected = np.take_along_axis(expected, batch["slots"][..., None], 1)
    weights = batch["weights"]["mlm"]
    used = weights > 0
    np.testing.assert_allclose(logits[used][:, :VOCAB], expected[used], atol=1e-4 * np.abs(expected[used]).max())
    log_p = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, batch["labels"][..., None], -1)[..., 0]
    assert metrics["loss/mlm"] == pytest.approx(np.nansum(weights * nll) / weights.sum(), rel=1e-4)

    hidden = oracle.forward(params["model"], CONFIG, corrupted, **both, hidden=True)
    dense, score = params["rtd"]["dense"], params["rtd"]["score"]
    h = oracle.ACTIVATIONS["gelu_tanh"](hidden @ dense["kernel"] + dense["bias"])
    p = 1 / (1 + np.exp(-(h @ score["kernel"] + score["bias"])[..., 0]))
    fake = corrupted != batch["tokens"]
    real = segments > 0
    cross_entropy = -np.log(np.where(fake, p, 1 - p))
    assert metrics["loss/rtd"] == pytest.approx(cross_entropy[real].mean(), rel=1e-4)
    assert float(loss) == pytest.approx(metrics["loss/mlm"] + 50 * metrics["loss/rtd"], rel=1e-6)
    assert metrics["fake_rate"] == pytest.approx(fake[real].mean(), rel=1e-6)
    guess = p > 0.5
    assert metrics["rtd_accuracy"] == pytest.approx((guess == fake)[real].mean(), rel=1e-6)
    assert metrics["rtd_precision"] == pytest.approx(fake[real & guess].mean(), rel=1e-6)
    assert metrics["rtd_recall"] == pytest.approx(guess[real & fake].mean(), rel=1e-6)


def test_only_selected_tokens_are_replaced_and_a_sample_that_is_the_token_is_no_fake():
    batch, logits, corrupted = replaced()
    selected = np.zeros(corrupted.shape, bool)
    for row in range(8):
        selected[row, batch["slots"][row][batch["weights"]["mlm"][row] > 0]] = True
    np.testing.assert_array_equal(corrupted[~selected], batch["tokens"][~selected])
    assert (corrupted[selected] < VOCAB).all()  # never a column of padding
    assert (corrupted != batch["tokens"])[selected].any()
    copying = np.where(np.arange(logits.shape[-1]) == batch["labels"][..., None], 100.0, 0.0)
    np.testing.assert_array_equal(gumbel_sample(KEYS, jnp.asarray(copying)), batch["labels"])


def test_a_generator_that_copies_leaves_nothing_to_detect():
    objective = detection(shares=(0.0, 0.0, 1.0), share="none", fraction=1.0)
    config = generator_config(CONFIG, 1.0, "none")
    model = params_of(config)
    # Nothing is masked; a stack whose blocks add nothing hands each token's own direction to the output layer.
    quiet = jax.tree.map(np.zeros_like, model["layers"])
    table = np.zeros_like(model["embedding"])
    table[:VOCAB] = np.random.default_rng(0).normal(size=(VOCAB, 16))
    table -= table.mean(1, keepdims=True)
    table /= np.linalg.norm(table, axis=1, keepdims=True) + 1e-9
    copier = model | {
        "layers": quiet,
        "embedding": (30 * table).astype(np.float32),
        "position_embedding": np.zeros_like(model["position_embedding"]),
        "final_norm": {"scale": np.ones(16, np.float32), "bias": np.zeros(16, np.float32)},
    }
    params = {"model": params_of(CONFIG), "generator": copier, "rtd": parameters()["rtd"]}
    batch = objective.prepare(text(), KEYS, jnp.int32(0))
    _, corrupted = objective.replace(params, batch, KEYS)
    np.testing.assert_array_equal(corrupted, text()["tokens"])
    _, metrics = jax.jit(lambda b: objective.loss(params, b, KEYS, False))(batch)
    assert metrics["fake_rate"][0] == 0 and metrics["accuracy"][0] == metrics["accuracy"][1] > 0


def test_samples_have_the_generators_distribution():
    logits = np.random.default_rng(0).normal(size=(1, 1, 12)).astype(np.float32)
    for temperature in (1.0, 0.5):
        draw = jax.jit(lambda keys, t=temperature: gumbel_sample(keys, jnp.broadcast_to(logits / t, (5000, 4, 12))))
        drawn = np.bincount(np.asarray(draw(row_keys(0, 0, jnp.arange(5000)))).ravel(), minlength=12)
        p = np.exp(logits[0, 0].astype(np.float64) / temperature)
        assert chisquare(drawn, 20000 * p / p.sum()).pvalue > 1e-4


def test_at_chance_the_loss_is_the_entropy_of_the_fake_rate():
    objective = detection()
    params, (batch, _, corrupted) = parameters(), replaced()
    fakes = (corrupted != batch["tokens"])[batch["target_weights"] > 0].mean()
    constant = {"dense": jax.tree.map(np.zeros_like, params["rtd"]["dense"])}
    constant["score"] = {
        "kernel": np.zeros((16, 1), np.float32),
        "bias": np.full(1, math.log(fakes / (1 - fakes)), np.float32),
    }
    sums, _ = jax.jit(lambda p, b: objective.loss(p, b, KEYS, False))(params | {"rtd": constant}, batch)
    entropy = -fakes * math.log(fakes) - (1 - fakes) * math.log(1 - fakes)
    assert float(sums["rtd"]) / batch["weights"]["rtd"].sum() == pytest.approx(entropy, rel=1e-5)


# --- what is learnt ---------------------------------------------------------------------------------------------------


def area_under_curve(scores, labels):
    """The chance that a fake scores above a true token, by counting pairs."""
    fake, true = scores[labels], scores[~labels]
    return np.mean((fake[:, None] > true[None, :]) + 0.5 * (fake[:, None] == true[None, :]))


@pytest.mark.slow
def test_replacements_are_detected_after_a_short_training():
    objective = detection(tiny(num_layers=1, d_model=32, d_ff=64, positions="rope", init_std=0.1), rate=0.2)

    def cycles(rows, seed):
        tokens = np.random.default_rng(seed).integers(0, 36, (rows, 1)) + np.arange(12)
        tokens = np.where(tokens % 36 == EOT, 0, tokens % 36).astype(np.int32)
        return {"tokens": tokens, "targets": tokens, "target_weights": np.ones(tokens.shape, np.float32)}

    mesh = make_mesh(devices=jax.devices()[:1])
    optimizer = make_optimizer("adamw", 5e-3, weight_decay=0.0)
    step = build_train_step(objective, optimizer, objective.batch_spec(32, 12), mesh=mesh)
    state = step.init(0)
    keys = row_keys(1, 0, jnp.arange(200))

    @jax.jit
    def detect(params):
        batch = objective.prepare(cycles(200, 10**6), keys, jnp.int32(0))
        _, corrupted = objective.replace(params, batch, keys)
        return objective.detect(params, batch, corrupted), corrupted != batch["tokens"]

    def auc(state):
        scores, fake = (np.asarray(x) for x in detect(state.all_params))
        return area_under_curve(scores.ravel(), fake.ravel())

    before = auc(state)
    for i in range(150):
        state, _ = step(state, cycles(32, i))
    assert abs(before - 0.5) < 0.15 and auc(state) > 0.8


# --- generator's size, contract, figures, errors ----------------------------------------------------------------------


def test_the_generator_is_a_quarter_as_wide_and_as_deep():
    config = tiny(num_layers=2, d_model=64, num_heads=8, d_ff=96)
    small = generator_config(config, 0.25)
    assert (small.d_model, small.num_heads, small.key_size, small.ff_size) == (16, 2, 8, 24)
    assert (small.num_layers, small.embed_size, small.vocab_size) == (2, 64, VOCAB)
    assert generator_config(config, 0.25, "none").embed_size == 16
    assert generator_config(config, 0.25, overrides={"num_layers": 1}).num_layers == 1
    rope = generator_config(tiny(d_model=24, num_heads=4, positions="rope"), 0.5)
    assert (rope.d_model, rope.num_heads) == (12, 2)
    same = generator_config(config, 1.0)
    assert count_parameters(same) == count_parameters(config)
    objective = ReplacedToken(Transformer(config), mask_token=MASK)
    shapes = unbox(jax.eval_shape(lambda key: objective.init(key, text()), jax.random.key(0)))
    own = sum(x.size for x in jax.tree.leaves(shapes["generator"]))
    assert own == count_parameters(small) - (VOCAB + 12) * 64


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(), id="electra", marks=pytest.mark.slow),
        pytest.param(
            dict(share="none", select="spans", temperature=0.7, coefs={"mlm": 1.0, "rtd": 50.0, "edit": 0.1}),
            id="apart_with_edit",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_variant_keeps_the_contract(options):
    report = check_objective(detection(tiny(num_layers=1, dropout=0.2), **options), text(documents=True, uneven=False))
    assert not report.skipped and not report.without_gradient


def test_evaluation_draws_the_same_samples_every_time():
    objective = detection(tiny(num_layers=1, dropout=0.1))
    mesh = make_mesh(devices=jax.devices()[:1])
    step = build_train_step(objective, make_optimizer("adamw", 1e-2), objective.batch_spec(8, 12), mesh=mesh)
    evaluate = build_eval_step(step, objective.batch_spec(8, 12))
    params = step.init(0).eval_params()
    first, again, others = (jax.device_get(evaluate(params, text(), at)) for at in (0, 0, 8))
    assert first == again and first["fake_rate"] != others["fake_rate"]
    assert "nll" not in first


def test_the_discriminator_is_a_checkpoint_to_start_from(tmp_path):
    mesh = make_mesh(devices=jax.devices()[:1])
    objective = detection()
    step = build_train_step(objective, make_optimizer("adamw", 1e-2), objective.batch_spec(8, 12), mesh=mesh)
    state = step.init(0)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, strip(state), metadata={})
        checkpointer.wait()
    causal = CausalLM(Transformer(CONFIG))
    other = build_train_step(causal, make_optimizer("adamw", 1e-2), causal.batch_spec(8, 12), mesh=mesh)
    params, restored = restore_subset(tmp_path / "checkpoints", other.init(1).all_params)
    assert_trees_close(jax.device_get(params["model"]), jax.device_get(state.params["model"]), rtol=0, atol=0)
    assert "generator" in restored.describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(share="all"), r"objective\.share is 'all'"),
        (dict(fraction=0.0), r"objective\.fraction is 0\.0"),
        (dict(fraction=2.0), r"objective\.fraction is 2\.0"),
        (dict(temperature=0.0), r"objective\.temperature is 0\.0"),
        (dict(generator={"layers": 2}), r"a key of objective\.generator is 'layers' \(did you mean 'num_layers'\?\)"),
        (dict(generator={"embedding_size": 8}), r"generator's embed_size is 8 and the discriminator's 16"),
        (dict(select="span"), r"objective\.select is 'span'"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        detection(**options)
    assert "\n" not in str(error.value)


def test_a_config_takes_its_special_tokens_from_the_tokenizer():
    setting = Setting(model=CONFIG, specials={"eot": 3, "mask": 36})
    objective = build_objective({"name": "replaced_token", "fraction": 0.5}, setting)
    assert (objective.mask_token, objective.masked_lm.specials) == (36, (3, 36))
    with pytest.raises(UserError, match=r"no special token 'mask'"):
        build_objective({"name": "replaced_token"}, Setting(model=CONFIG))
