"""Generation: the sampler's limits, the cache against the full forward pass, requests that ignore their batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import VOCAB, params_of, tiny, tokens
from scipy import stats

from gpt_jax.errors import UserError
from gpt_jax.generation import Sampling, filter_logits, generate, penalise, sample_token, slots_for, stream_batch
from gpt_jax.model import Mask, Transformer
from gpt_jax.model.decoding import Transposed, decoding_params
from gpt_jax.model.derivatives import multiply

VARIANTS = {
    "learned": {},
    "rope": {"positions": "rope"},
    "alibi": {"positions": "alibi"},
    "grouped": {"num_kv_heads": 2},
    "factorised": {"embedding_size": 6},
    "banded": {"pattern": ("dense", "band"), "window": 3},
    "talking": {"talking_heads": True},
    "unequal": {"head_dims": (2, 4, 6, 4)},
    "block": {"block": "toys:ParallelBlock"},
    "softcap": {"attention_softcap": 3.0, "logit_softcap": 5.0, "qk_norm": True},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_greedy_from_the_cache_is_greedy_from_the_full_forward_pass_for_ragged_prompts(variant):
    config = tiny(max_positions=24, **variant)
    model, params = Transformer(config), params_of(config)
    prompts = [row[:n].tolist() for row, n in zip(tokens(rows=3, length=8), (8, 3, 1), strict=True)]
    new, scores = generate(model, params, prompts, max_tokens=6, temperature=0.0, logprobs=True)
    forward = jax.jit(lambda t: model.apply({"params": params}, t).logits)
    for prompt, row, values in zip(prompts, new, scores, strict=True):
        text = np.zeros((1, 24), np.int32)
        text[0, : len(prompt) + 6] = prompt + row
        logits = np.asarray(forward(text))[0, len(prompt) - 1 : len(prompt) + 5]
        full = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        np.testing.assert_allclose(values, full[np.arange(6), row], atol=1e-4)
        np.testing.assert_allclose(logits[np.arange(6), row], logits.max(-1), atol=1e-4)


@pytest.mark.parametrize("name", ["learned", "rope", "alibi", "grouped", "banded"])
def test_ragged_prompts_read_both_ways_from_the_cache_are_those_of_the_full_forward_pass(name):
    config = tiny(max_positions=24, **VARIANTS[name])
    model, params = Transformer(config), params_of(config)
    prompts = [row[:n].tolist() for row, n in zip(tokens(rows=4, length=8), (8, 5, 3, 1), strict=True)]
    settings = dict(max_tokens=6, temperature=0.0, logprobs=True)
    new, scores = generate(model, params, prompts, bidirectional_prompt=True, **settings)
    forward = jax.jit(lambda t, prefix: model.apply({"params": params}, t, mask=Mask("prefix", None, prefix)).logits)
    for prompt, row, values in zip(prompts, new, scores, strict=True):
        text = np.zeros((1, 24), np.int32)
        text[0, : len(prompt) + 6] = prompt + row
        logits = np.asarray(forward(text, np.arange(24)[None] < len(prompt)))[0, len(prompt) - 1 : len(prompt) + 5]
        expected = np.asarray(jax.nn.log_softmax(logits))
        np.testing.assert_allclose(values, expected[np.arange(6), row], atol=1e-4)
        np.testing.assert_allclose(logits[np.arange(6), row], logits.max(-1), atol=1e-4)
    causal = generate(model, params, prompts, **settings)[1]
    assert abs(causal[0][0] - scores[0][0]) > 1e-3 and abs(causal[3][0] - scores[3][0]) < 1e-5  # of 8 tokens, of one


@pytest.mark.parametrize("rows", [1, 5, 200])
def test_a_transposed_kernel_gives_the_product_of_the_kernel(rows):
    rng = np.random.default_rng(rows)
    x, kernel = rng.normal(size=(rows, 6)).astype(np.float32), rng.normal(size=(6, 3, 4)).astype(np.float32)
    transposed = Transposed(jnp.asarray(kernel.reshape(6, -1).T), kernel.shape)
    np.testing.assert_array_equal(transposed.kernel(), kernel)
    np.testing.assert_allclose(jax.jit(multiply)(x, transposed), np.tensordot(x, kernel, 1), rtol=1e-4, atol=1e-5)
    merged = Transposed(jnp.asarray(kernel.reshape(18, 4).T), kernel.shape)  # of two input axes
    wide = rng.normal(size=(rows, 18)).astype(np.float32)
    np.testing.assert_allclose(multiply(wide, merged), wide @ kernel.reshape(18, 4), rtol=1e-4, atol=1e-5)


def test_kernels_are_transposed_on_a_cpu_for_two_rows_or_more(monkeypatch):
    config = tiny()
    params = params_of(config)

    def transposed(rows):
        leaves = jax.tree.leaves(decoding_params(config, params, rows), is_leaf=lambda x: isinstance(x, Transposed))
        return any(isinstance(leaf, Transposed) for leaf in leaves)

    assert transposed(2) and transposed(5) and not transposed(1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not transposed(2)


def test_a_request_gets_the_same_tokens_alone_or_in_any_batch():
    config = tiny(max_positions=40)
    model, params = Transformer(config), params_of(config)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    together = generate(model, params, prompts, max_tokens=8, seeds=[11, 12, 13])
    for prompt, seed, row in zip(prompts, (11, 12, 13), together, strict=True):
        assert generate(model, params, [prompt], max_tokens=8, seeds=[seed]) == [row]
    assert generate(model, params, prompts, max_tokens=8, seeds=[14, 15, 16]) != together


def draws(logits, sampling, n=20000):
    keys = jax.random.split(jax.random.key(0), n)
    return np.asarray(jax.jit(lambda k: sample_token(jnp.tile(logits, (n, 1)), k, sampling))(keys))


def test_sampling_follows_the_softmax_by_chi_square():
    logits = jnp.asarray([[2.0, 1.0, 0.0, -1.0, 0.5]])
    for temperature in (1.0, 0.5):
        p = np.asarray(jax.nn.softmax(logits / temperature), np.float64)[0]
        counts = np.bincount(draws(logits, Sampling(temperature)), minlength=5)
        assert stats.chisquare(counts, p / p.sum() * counts.sum()).pvalue > 0.001


def numpy_filter(logits, sampling):
    """What is left of softmax(logits / temperature), by sorting."""
    p = np.exp((logits - logits.max()) / sampling.temperature)
    p /= p.sum()
    order = np.argsort(-p)
    kept = np.ones(len(p), bool)
    if sampling.top_k:
        kept[order[sampling.top_k :]] = False
    q = np.where(kept, p, 0) / p[kept].sum()
    before = np.concatenate([[0], np.cumsum(q[order])[:-1]])
    kept[order] &= before < sampling.top_p  # the token that crosses p is kept
    kept &= p >= sampling.min_p * p.max()
    return np.where(kept, p, 0) / p[kept].sum()


@pytest.mark.parametrize("size", [30, 1500])  # sorted, and by the bits of a threshold
@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.8, top_k=9), Sampling(1.0, top_p=0.7), Sampling(1.2, min_p=0.05), Sampling(0.9, 12, 0.8, 0.01)],
    ids=["top_k", "top_p", "min_p", "all"],
)
def test_each_filter_draws_from_its_distribution_by_chi_square(size, sampling):
    logits = np.random.default_rng(size).normal(0, 2, size).astype(np.float32)
    p = numpy_filter(logits.astype(np.float64), sampling)
    counts = np.bincount(draws(jnp.asarray(logits)[None], sampling, 4000), minlength=size)
    assert counts[p == 0].sum() == 0
    often = p * 4000 >= 5  # the rest is one class
    observed, expected = [*counts[often], counts[~often].sum()], [*p[often], p[~often].sum()]
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    assert stats.chisquare(observed, 4000 * np.array(expected)).pvalue > 0.001


@pytest.mark.parametrize(
    "sampling",
    [
        *map(Sampling, (0.0, 1e-320, 1e-40, 1.2e-38)),
        Sampling(1.0, top_k=1),
        Sampling(1.0, top_p=0.0),
        Sampling(1.0, min_p=1.0),
    ],
)
def test_every_limit_is_greedy(sampling):
    assert set(draws(jnp.asarray([[0.1, 0.3, 0.2]]), sampling, 200)) == {1}


def test_nucleus_keeps_the_token_that_crosses_p_and_top_k_keeps_k():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    kept = lambda s: set(np.flatnonzero(np.asarray(filter_logits(logits, s))[0] > -1e29))  # noqa: E731
    assert kept(Sampling(top_p=0.6)) == {0, 1} and kept(Sampling(top_p=0.5)) == {0}
    assert kept(Sampling(top_k=3)) == {0, 1, 2} and kept(Sampling(min_p=0.2)) == {0, 1, 2}


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    out = penalise(jnp.asarray([[2.0, -2.0, 1.0]]), jnp.asarray([[True, True, False]]), 2.0)
    np.testing.assert_allclose(out, [[1.0, -4.0, 1.0]])


def test_finished_rows_stay_as_they_are_and_end_the_loop():
    config = tiny(max_positions=64)
    model, params = Transformer(config), params_of(config)
    free = generate(model, params, [[1], [2]], max_tokens=12, temperature=0.0)
    eot = free[0][3]
    ended = generate(model, params, [[1], [2]], max_tokens=12, temperature=0.0, eot=eot)
    assert ended[0] == free[0][: free[0].index(eot)]
    expected = free[1][: free[1].index(eot)] if eot in free[1] else free[1]
    assert ended[1] == expected


def test_slots_are_enough_and_few():
    assert [slots_for(n) for n in (1, 16, 17, 100, 112, 240, 257, 1000)] == [16, 16, 32, 112, 112, 240, 288, 1024]
    for n in range(1, 5000):
        assert n <= slots_for(n) <= max(n + 15, n * 9 / 8)


def test_chunks_are_the_whole():
    config = tiny(max_positions=40)
    model, params = Transformer(config), params_of(config)
    parts = [t for t, _, _ in stream_batch(model, params, [[1, 2]], max_tokens=9, seeds=[3], chunk=2)]
    assert np.concatenate(parts, axis=1).tolist() == generate(model, params, [[1, 2]], max_tokens=9, seeds=[3])


def test_mistakes_are_named():
    config = tiny()
    model, params = Transformer(config), params_of(config)
    with pytest.raises(UserError, match="prompt of 5 tokens and max_tokens=8 do not fit the model's 12"):
        generate(model, params, [[1] * 5], max_tokens=8)
    with pytest.raises(UserError, match=f"token {VOCAB} is not in the model's vocabulary"):
        generate(model, params, [[VOCAB]], max_tokens=2)
    with pytest.raises(UserError, match="top_p is 1.5"):
        Sampling(top_p=1.5)
    with pytest.raises(UserError, match="a prompt is empty"):
        generate(model, params, [[]], max_tokens=2)
