"""Policy gradient on a bandit of six arms: every method reaches its own optimum, which is not always the one meant."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bandit import (
    EOT,
    REFERENCE,
    REWARDS,
    Table,
    forward_kl_optimum,
    params_of,
    policy_of,
    tilted,
    total_variation,
    with_std,
)
from helpers import tiny

from gpt_jax.errors import UserError
from gpt_jax.model import Transformer
from gpt_jax.objectives.policy_gradient import PolicyGradient
from gpt_jax.testing import check_objective

BETA = 0.25


def bandit_batch(arms_NxG, behaviour_V, rewards_V=REWARDS):
    """The batch of a rollout: groups of pulled arms, each row one answer of one token. Traced or not."""
    N, G = arms_NxG.shape
    arms = arms_NxG.reshape(-1)
    log_b, log_ref = jnp.log(behaviour_V)[arms], jnp.log(jnp.asarray(REFERENCE, jnp.float32))[arms]
    of_group = lambda x: jnp.repeat(x.reshape(N, G), G, axis=0)  # noqa: E731
    rewards = jnp.asarray(rewards_V, jnp.float32)[arms]
    one = jnp.ones((N * G, 1))
    return {
        "tokens": jnp.full((N * G, 1), EOT),
        "targets": arms[:, None],
        "target_weights": one,
        "prefix": one > 1,
        "segment_ids": one.astype(int),
        "positions": one.astype(int) - 1,
        "behaviour_logprobs": log_b[:, None],
        "reference_logprobs": log_ref[:, None],
        "group_rewards": of_group(rewards),
        "group_kl": of_group(log_b - log_ref),
        "member": jnp.tile(jnp.arange(G), N),
        "rewards": rewards[:, None],
    }


def total(objective, params, batch):
    """The loss as the train step makes it: each term over its weight, times its coefficient."""
    keys = jax.random.split(jax.random.key(0), len(batch["tokens"]))
    prepared = objective.prepare(batch, keys, 0)
    sums, _ = objective.loss(params, prepared, keys, True)
    return sum(coef * sums[term] / prepared["weights"][term].sum() for term, coef in objective.coefs.items())


def trained(objective, groups=24, steps=250, rate=0.08):
    """The policy after stochastic updates, each on fresh pulls of the current policy."""
    optimizer, params = optax.adam(optax.cosine_decay_schedule(rate, steps)), params_of()

    def update(carry, key):
        model, state = carry
        policy = jax.nn.softmax(model["logits"][0, EOT])
        arms = jax.random.categorical(key, jnp.log(policy), shape=(groups, objective.group))
        batch = bandit_batch(arms, policy)
        gradient = jax.grad(lambda m: total(objective, {**params, "model": m}, batch))(model)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(model, updates), state), None

    start = (params["model"], optimizer.init(params["model"]))
    keys = jax.random.split(jax.random.key(7), steps)
    return policy_of({"model": jax.jit(lambda c: jax.lax.scan(update, c, keys)[0])(start)[0]})


METHODS = {
    "reinforce": (dict(algorithm="reinforce"), lambda: tilted(BETA)),
    "reinforce, group mean": (dict(algorithm="reinforce", baseline="group"), lambda: tilted(BETA)),
    "grpo": (dict(algorithm="grpo"), lambda: with_std(forward_kl_optimum, BETA)),
    "grpo, weighted": (dict(algorithm="grpo", kl="weighted"), lambda: with_std(tilted, BETA)),
    "dr_grpo": (dict(algorithm="dr_grpo"), lambda: forward_kl_optimum(BETA)),
    "dr_grpo, weighted": (dict(algorithm="dr_grpo", kl="weighted"), lambda: tilted(BETA)),
}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_reaches_its_own_optimum(name):
    options, optimum = METHODS[name]
    objective = PolicyGradient(Table(), beta=BETA, group=64, **options)
    found, expected = trained(objective), optimum()
    assert total_variation(found, expected) < 0.02
    others = [other() for key, (_, other) in METHODS.items() if total_variation(other(), expected) > 1e-6]
    assert min(total_variation(found, other) for other in others) > 0.02  # which tells it from the other optima


def test_the_optima_are_those_of_the_article():
    """The closed forms satisfy the stationarity of what they are said to be the best of."""
    for optimum, gradient in (
        (tilted(BETA), lambda p: REWARDS - BETA * np.log(p / REFERENCE)),
        (forward_kl_optimum(BETA), lambda p: REWARDS + BETA * REFERENCE / p),
    ):
        slope = gradient(optimum)
        assert optimum.sum() == pytest.approx(1, abs=1e-9)
        np.testing.assert_allclose(slope, slope.mean(), rtol=1e-6)
    assert total_variation(tilted(BETA), forward_kl_optimum(BETA)) > 0.05


def exact_gradient(policy, values):
    """d sum_a pi_a v_a / d logits, v held constant."""
    return policy * (values - (policy * values).sum())


@pytest.mark.parametrize("name", ["reinforce", "dr_grpo, weighted", "dr_grpo"])
def test_the_gradient_is_unbiased(name):
    """z-test of sampled gradients against enumeration over the arms, at a policy that is not the reference."""
    options, _ = METHODS[name]
    objective = PolicyGradient(Table(), beta=BETA, group=4, **options | {"baseline": "leave_one_out"})
    policy = np.array([0.05, 0.3, 0.1, 0.25, 0.2, 0.1])
    params = params_of(policy=policy)
    if name == "dr_grpo":  # k3 differentiated through pi alone: of KL(pi_ref || pi) the gradient is pi - pi_ref
        expected = -exact_gradient(policy, REWARDS) + BETA * (policy - REFERENCE)
    else:
        expected = -exact_gradient(policy, REWARDS - BETA * np.log(policy / REFERENCE))

    def one(key):
        arms = jax.random.categorical(key, jnp.log(jnp.asarray(policy, jnp.float32)), shape=(1, 4))
        batch = bandit_batch(arms, jnp.asarray(policy, jnp.float32))
        return jax.grad(lambda m: total(objective, {**params, "model": m}, batch))(params["model"])["logits"][0, EOT]

    n = 20_000
    samples = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), n)), np.float64)
    z = (samples.mean(0) - expected) / (samples.std(0) / np.sqrt(n))
    assert np.abs(z).max() < 4
    wrong = -exact_gradient(policy, REWARDS)  # without the divergence: far enough away to be seen
    assert np.abs((samples.mean(0) - wrong) / (samples.std(0) / np.sqrt(n))).max() > 8


V, T = 3, 2  # of the sequences below: two tokens of three


def sequence_batch(answers_NxT, log_b, log_ref, reward):
    """Groups of one prompt (token V) and answers of two tokens; log_b, log_ref: [T, V + 1, V]."""
    N = len(answers_NxT)
    before = jnp.concatenate([jnp.full((N, 1), V), answers_NxT[:, :1]], axis=1)
    at = jnp.arange(T)[None]
    b, ref = log_b[at, before, answers_NxT], log_ref[at, before, answers_NxT]
    rewards = reward[answers_NxT[:, 0], answers_NxT[:, 1]]
    whole = lambda x: jnp.broadcast_to(x, (N, N))  # noqa: E731
    return {
        "tokens": before,
        "targets": answers_NxT,
        "target_weights": jnp.ones((N, T)),
        "prefix": jnp.zeros((N, T), bool),
        "segment_ids": jnp.ones((N, T), int),
        "positions": jnp.broadcast_to(at, (N, T)),
        "behaviour_logprobs": b,
        "reference_logprobs": ref,
        "group_rewards": whole(rewards),
        "group_kl": whole((b - ref).sum(1)),
        "member": jnp.arange(N),
        "rewards": rewards[:, None],
    }


@pytest.mark.parametrize("kl", ["reward", "weighted"])
def test_the_gradient_of_longer_answers_is_that_of_the_whole_sequence(kl):
    """Against enumeration of all answers of two tokens, the KL of whole sequences included."""
    rng = np.random.default_rng(0)
    logits, reference, reward = rng.normal(size=(T, V + 1, V)), rng.normal(size=(T, V + 1, V)), rng.normal(size=(V, V))
    objective = PolicyGradient(Table(V, T), beta=0.5, group=4, kl=kl)
    log_ref = jax.nn.log_softmax(jnp.asarray(reference, jnp.float32))

    def objective_value(x):
        p, q = (jax.nn.log_softmax(jnp.asarray(t)) for t in (x, reference))
        value = 0.0
        for a, b in itertools.product(range(V), range(V)):
            log_p, log_q = p[0, V, a] + p[1, a, b], q[0, V, a] + q[1, a, b]
            value += jnp.exp(log_p) * (reward[a, b] - 0.5 * (log_p - log_q))
        return value

    expected = -np.asarray(jax.grad(objective_value)(jnp.asarray(logits, jnp.float32)))
    params = {"model": {"logits": jnp.asarray(logits, jnp.float32)}, "reference": {"logits": jnp.zeros((T, V + 1, V))}}
    log_b = jax.nn.log_softmax(params["model"]["logits"])

    def one(key):
        first = jax.random.categorical(jax.random.fold_in(key, 0), log_b[0, V], shape=(4,))
        second = jax.random.categorical(jax.random.fold_in(key, 1), log_b[1, first])
        batch = sequence_batch(jnp.stack([first, second], 1), log_b, log_ref, jnp.asarray(reward, jnp.float32))
        return jax.grad(lambda m: total(objective, {**params, "model": m}, batch))(params["model"])["logits"]

    n = 20_000
    samples = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(5), n)), np.float64)
    moved = samples.std(0) > 0
    z = (samples.mean(0) - expected)[moved] / (samples.std(0)[moved] / np.sqrt(n))
    assert np.abs(z).max() < 4.5 and np.abs(expected[~moved]).max() < 1e-6
    assert np.abs(expected[moved]).max() > 20 * (samples.std(0) / np.sqrt(n)).max()


def rollout(rows=8, length=12, group=4, seed=0, kind=np.float32, rewards=2):
    """A rollout as the source delivers it, for a Transformer: prompts and answers of uneven lengths."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 37, (rows, length + 1)).astype(np.int32)
    prompts, ends = rng.integers(2, 6, (rows, 1)), rng.integers(7, length + 1, (rows, 1))
    place = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    answer = (place >= prompts - 1) & (place < ends)
    values = np.repeat(rng.normal(size=(rows // group, group)), group, 0)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "target_weights": answer.astype(kind),
        "prefix": place < prompts,
        "segment_ids": (place < ends).astype(np.int32),
        "positions": place,
        "behaviour_logprobs": rng.normal(-3.6, 0.1, (rows, length)).astype(kind),
        "reference_logprobs": rng.normal(-3.6, 0.1, (rows, length)).astype(kind),
        "group_rewards": values.astype(kind),
        "group_kl": np.repeat(rng.normal(size=(rows // group, group)), group, 0).astype(kind),
        "member": np.tile(np.arange(group, dtype=np.int32), rows // group),
        "rewards": rng.normal(size=(rows, rewards)).astype(kind),
    }


@functools.cache
def free_gradient(options, equal=False):
    """The gradient with respect to the logits of every place."""
    batch = rollout()
    if equal:
        batch["group_rewards"][:] = 0.1 + 0.2
    shape = (8, 12, 37)

    class Free:
        config = tiny()

        def apply(self, params, tokens, **kwargs):
            return tokens if kwargs["method"] == "unembed" else (params["params"], None)

    objective = PolicyGradient(Free(), group=4, rewards=("exact_match", "format"), **dict(options))
    logits = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    params = {"reference": None}
    return np.asarray(jax.grad(lambda x: total(objective, {**params, "model": x}, batch))(logits)), batch


ALL = [
    (("algorithm", "reinforce"),),
    (("algorithm", "grpo"),),
    (("algorithm", "dr_grpo"), ("kl", "weighted"), ("length", "token")),
    (("algorithm", "reinforce"), ("length", "token"), ("kl", "loss")),
]


@pytest.mark.parametrize("options", ALL)
def test_nothing_flows_into_prompts_or_padding(options):
    gradient, batch = free_gradient(options)
    answers = batch["target_weights"] > 0
    assert (gradient[~answers] == 0).all()
    assert (np.abs(gradient[answers]).max(-1) > 0).mean() > 0.5  # not all: clipping stops some


@pytest.mark.parametrize("algorithm", ["reinforce", "grpo", "dr_grpo"])
def test_equal_rewards_teach_nothing_at_all(algorithm):
    gradient, _ = free_gradient((("algorithm", algorithm), ("kl", "none")), equal=True)
    assert (gradient == 0).all()


def test_advantages_are_those_of_the_formulas():
    batch, r = rollout(), None
    r = batch["group_rewards"][::4]  # [groups, 4]
    found = {}
    for baseline, std in (("leave_one_out", False), ("group", False), ("group", True), ("none", False)):
        objective = PolicyGradient(Table(), group=4, baseline=baseline, std=std, kl="none")
        found[baseline, std] = np.asarray(objective.advantages(batch)).reshape(-1, 4)
    others = (r.sum(1, keepdims=True) - r) / 3
    np.testing.assert_allclose(found["leave_one_out", False], r - others, atol=1e-6)
    np.testing.assert_allclose(found["group", False], r - r.mean(1, keepdims=True), atol=1e-6)
    expected = (r - r.mean(1, keepdims=True)) / (r.std(1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(found["group", True], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["none", False], r, atol=1e-6)
    with_kl = PolicyGradient(Table(), group=4, baseline="none", kl="reward", beta=0.5)
    np.testing.assert_allclose(
        np.asarray(with_kl.advantages(batch)).reshape(-1, 4), r - 0.5 * batch["group_kl"][::4], atol=1e-6
    )


def test_values_are_those_of_numpy():
    """Clipping, lengths, k3 and the metrics, from the log-probabilities, for each kind of length."""
    batch, mask = rollout(), rollout()["target_weights"]
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(8, 12, 37)).astype(np.float32)
    batch["behaviour_logprobs"] = (batch["behaviour_logprobs"] + rng.normal(0, 0.3, (8, 12))).astype(np.float32)

    class Fixed:
        config = tiny()

        def apply(self, params, tokens, **kwargs):
            return tokens if kwargs["method"] == "unembed" else (jnp.asarray(logits), None)

    table = logits / 2.0 - np.log(np.exp(logits / 2.0).sum(-1, keepdims=True))
    logp = np.take_along_axis(table, batch["targets"][..., None], -1)[..., 0]
    ratio, d = np.exp(logp - batch["behaviour_logprobs"]), batch["reference_logprobs"] - logp
    k3, n = np.exp(d) - d - 1, mask.sum(1, keepdims=True)
    base = PolicyGradient(Fixed(), algorithm="grpo", group=4, temperature=2.0, beta=0.1, rewards=("a:b", "c:d"))
    A = np.asarray(base.advantages(batch))[:, None]
    gain = np.minimum(ratio * A, np.clip(ratio, 0.8, 1.2) * A)
    keys = jax.random.split(jax.random.key(0), 8)
    for length, scale, weight in (("sequence", 1 / n, 8), ("none", 1, 8), ("token", 1, mask.sum())):
        objective = dataclasses.replace(base, length=length)
        prepared = objective.prepare(batch, keys, 0)
        sums, metrics = objective.loss({"model": None}, prepared, keys, False)
        assert float(sums["policy"]) == pytest.approx(-(mask * gain * scale).sum(), rel=1e-4)
        assert float(sums["kl"]) == pytest.approx((mask * k3 * scale).sum(), rel=1e-4)
        assert float(prepared["weights"]["policy"].sum()) == pytest.approx(weight)
    found = {name: float(a / b) for name, (a, b) in metrics.items()}
    assert (k3[mask > 0] >= 0).all() and found["kl"] == pytest.approx((mask * k3).sum(1).mean(), rel=1e-4)
    assert found["length"] == pytest.approx(mask.sum(1).mean())
    assert found["entropy"] == pytest.approx(-(mask[..., None] * np.exp(table) * table).sum() / mask.sum(), rel=1e-4)
    assert found["clipped"] == pytest.approx((mask * (np.abs(ratio - 1) > 0.2)).sum() / mask.sum(), abs=1e-6)
    assert found["reward/b"] == pytest.approx(batch["rewards"][:, 0].mean(), rel=1e-4)
    own = batch["group_rewards"][np.arange(8), batch["member"]]
    assert found["reward"] == pytest.approx(own.mean(), rel=1e-3, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("options", [ALL[1], (("algorithm", "reinforce"), ("mask", "prefix"))])
def test_it_keeps_the_contract(options):
    config = tiny(dropout=0.1)
    objective = PolicyGradient(Transformer(config), group=4, rewards=("exact_match", "format"), **dict(options))
    # GRPO's policy term is a difference of large numbers, near 0: relative to it, rounding is more.
    check_objective(objective, rollout(), tolerance=2e-4 if objective.std else 2e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(algorithm="grop"), "objective.algorithm is 'grop' .did you mean 'grpo'"),
        (dict(kl="los"), "did you mean 'loss'"),
        (dict(group=1), "a baseline of the group needs at least 2"),
        (dict(rollout_every=4, rollout_epochs=3), "a divisor of rollout_every .4."),
        (dict(temperature=0.0), "temperature is 0.0; it must be above 0"),
        (dict(length="sequence"), "with ratio='sequence' there is none"),
        (dict(rewards=("format", {"name": "format"})), "name one of two anew"),
        (dict(rewards=({"weight": 1.0},)), "a table with a 'name', is needed"),
        (dict(rewards=(3,)), "objective.rewards has 3"),
        (dict(rewards=3), "objective.rewards is 3"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        PolicyGradient(Table(), **options)
