"""Beam search against the enumeration of every text; ring caches of banded layers against the plain forward pass."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import params_of, tiny, tokens

from gpt_jax.beam import beam_search, length_penalty
from gpt_jax.errors import UserError
from gpt_jax.generation import batches_for_search, generate
from gpt_jax.model import Cache, Transformer
from gpt_jax.model.cache import ring_slots


@pytest.fixture(scope="module")
def four():
    """A model of four tokens, and log-probabilities of what follows a text."""
    config = tiny(vocab_size=4, vocab_multiple=4, max_positions=16, init_std=0.6)
    model, params = Transformer(config), params_of(config)
    forward = jax.jit(lambda t: jax.nn.log_softmax(model.apply({"params": params}, t).logits))
    return model, params, lambda text: np.asarray(forward(jnp.asarray([text + [0] * (8 - len(text))])))[0]


def enumerate_texts(logp, prompt, n, eot, alpha):
    """Score of every text of up to n tokens that ends at `eot` or has n, by brute force."""
    found = {}
    for text in itertools.product(range(4), repeat=n):
        text = list(text)
        end = text.index(eot) + 1 if eot in text else n
        key = tuple(text[:end])
        if key not in found:
            logits = logp(prompt + text)
            total = sum(float(logits[len(prompt) + i - 1, t]) for i, t in enumerate(key))
            found[key] = total / length_penalty(len(key), alpha)
    return sorted(((score, [t for t in key if t != eot]) for key, score in found.items()), reverse=True)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
def test_beam_search_with_every_prefix_as_a_beam_is_exhaustive(four, alpha):
    model, params, logp = four
    for prompt, eot in (([1, 2], 0), ([3], 2), ([1], 9)):
        best = enumerate_texts(logp, prompt, 4, eot, alpha)[:6]
        if eot == 9:  # never ends: eot=None
            eot = None
        found = beam_search(model, params, [prompt], max_tokens=4, beams=256, alpha=alpha, eot=eot, results=6)[0]
        np.testing.assert_allclose([score for _, score in found], [score for score, _ in best], atol=1e-4)
        assert found[0][0] == best[0][1]


def test_the_penalty_decides_between_short_and_long(four):
    model, params, _ = four
    lengths = [
        len(beam_search(model, params, [[1, 2]], max_tokens=6, beams=64, alpha=alpha, eot=0)[0][0][0])
        for alpha in (0.0, 8.0)
    ]
    assert lengths[0] < lengths[1]


def test_one_beam_is_greedy_and_prompts_do_not_disturb_each_other():
    config = tiny(max_positions=32)
    model, params = Transformer(config), params_of(config)
    prompts = [row[:n].tolist() for row, n in zip(tokens(rows=3, length=8), (8, 3, 1), strict=True)]
    greedy = generate(model, params, prompts, max_tokens=6, temperature=0.0)
    assert [found[0][0] for found in beam_search(model, params, prompts, max_tokens=6, beams=1)] == greedy
    together = beam_search(model, params, prompts, max_tokens=6, beams=3, results=3)
    for prompt, found in zip(prompts, together, strict=True):
        alone = beam_search(model, params, [prompt], max_tokens=6, beams=3, results=3)[0]
        assert [ids for ids, _ in alone] == [ids for ids, _ in found]
        scores = [score for _, score in found]
        assert scores == sorted(scores, reverse=True) and len({tuple(ids) for ids, _ in found}) == 3


def test_prompts_are_searched_together_as_far_as_their_rows_are_64():
    prompts = [[7] * n for n in (5, 1, 3, *[2] * 40)]
    for width, most in ((1, 32), (4, 16), (100, 1)):
        found = list(batches_for_search(prompts, width))
        assert sorted(row for rows, _, _ in found for row in rows) == list(range(43))
        assert max(len(rows) for rows, _, _ in found) == most
        for rows, ids, lengths in found:
            assert lengths[: len(rows)].tolist() == [len(prompts[row]) for row in rows]
            assert (ids == 7).sum(1).tolist() == lengths.tolist() and (ids[: len(rows), -1] == 7).all()


def test_mistakes_are_named(four):
    model, params, _ = four
    for setting, said in (({"beams": 0}, "beams is 0"), ({"results": 9}, "results 9"), ({"alpha": -1.0}, "-1.0")):
        with pytest.raises(UserError, match=said):
            beam_search(model, params, [[1]], max_tokens=2, **setting)


# -- banded layers keep a ring ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["learned", "rope", "alibi"])
def test_a_ring_cache_is_the_masked_dense_recomputation(positions):
    config = tiny(pattern=("dense", "band"), window=3, positions=positions, max_positions=80)
    model, params = Transformer(config), params_of(config)
    prompts = [row[:n].tolist() for row, n in zip(tokens(rows=3, length=11), (11, 3, 1), strict=True)]
    n, ring = 45, ring_slots(config, 16)
    assert ring == 32 < 16 + n  # it goes round
    new, scores = generate(model, params, prompts, max_tokens=n, temperature=0.0, logprobs=True)
    forward = jax.jit(lambda t: jax.nn.log_softmax(model.apply({"params": params}, t).logits))
    for prompt, row, values in zip(prompts, new, scores, strict=True):
        text = np.zeros((1, 64), np.int32)
        text[0, : len(prompt) + n] = prompt + row
        logp = np.asarray(forward(text))[0, len(prompt) - 1 : len(prompt) + n - 1]
        np.testing.assert_allclose(values, logp[np.arange(n), row], atol=1e-4)
        np.testing.assert_allclose(values, logp.max(-1), atol=1e-4)


def test_a_prompt_in_pieces_fills_the_ring_as_the_whole(monkeypatch):
    monkeypatch.setattr("gpt_jax.generation._PREFILL", 16)
    config = tiny(pattern=("band", "dense"), window=5, positions="rope", max_positions=200)
    model, params = Transformer(config), params_of(config)
    for n in (40, 60, 90):  # 48 = 3 x 16, 64 = 4 x 16 and 96 tokens
        prompt = np.random.default_rng(n).integers(0, 37, n).tolist()
        new, scores = generate(model, params, [prompt], max_tokens=8, temperature=0.0, logprobs=True)
        logits = model.apply({"params": params}, jnp.asarray([prompt + new[0]])).logits[0, n - 1 : n + 7]
        logp = np.asarray(jax.nn.log_softmax(logits))
        np.testing.assert_allclose(scores[0], logp[np.arange(8), new[0]], atol=1e-4)
        np.testing.assert_allclose(scores[0], logp.max(-1), atol=1e-4)


def test_a_prompt_of_three_halves_of_a_piece_goes_in():
    config = tiny(positions="rope", num_layers=1, max_positions=400)
    model, params = Transformer(config), params_of(config)
    prompt = np.random.default_rng(1).integers(0, 37, 300).tolist()  # laid out as 384 tokens
    new, scores = generate(model, params, [prompt], max_tokens=2, temperature=0.0, logprobs=True)
    logp = jax.nn.log_softmax(model.apply({"params": params}, jnp.asarray([prompt + new[0]])).logits[0])
    np.testing.assert_allclose(scores[0], [logp[299, new[0][0]], logp[300, new[0][1]]], atol=1e-4)


def test_only_banded_layers_have_fewer_slots():
    config = tiny(pattern=("dense", "band"), window=3, max_positions=80)
    cache = Cache.empty(config, 2, 64, 32)
    assert [k.shape[1] for k in cache.k_NxSxK] == [64, 32]
    assert [k.shape[1] for k in Cache.empty(config, 2, 64).k_NxSxK] == [64, 64]
    assert Cache.empty(tiny(), 2, 64, 32).ring_BxR is None and Cache.empty(config, 2, 32, 32).ring_BxR is None
