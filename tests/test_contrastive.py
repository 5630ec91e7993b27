"""Contrastive search: the tokens that a plain loop over the whole forward pass chooses."""

import jax
import numpy as np
import pytest
from helpers import params_of, tiny, tokens

from gpt_jax.contrastive import contrastive_search
from gpt_jax.errors import UserError
from gpt_jax.generation import generate
from gpt_jax.model import Transformer

VARIANTS = {
    "learned": {},
    "rope": {"positions": "rope"},
    "banded": {"pattern": ("dense", "band"), "window": 3},
    "grouped": {"num_kv_heads": 2},
}


def by_hand(model, params, prompt, new, k, alpha):
    """Every candidate through the whole model, without a cache."""
    encode = jax.jit(lambda t: model.apply({"params": params}, t, method="encode")[0])
    ids = list(prompt)
    for _ in range(new):
        hidden = np.asarray(encode(np.array([ids])), np.float64)[0]
        logits = np.asarray(model.apply({"params": params}, hidden[None, -1:].astype(np.float32), method="unembed"))
        logits = logits[0, 0, : model.config.vocab_size].astype(np.float64)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        scores = {}
        for token in np.argsort(-p)[:k].tolist():
            state = np.asarray(encode(np.array([[*ids, token]])), np.float64)[0, -1]
            cosines = hidden @ state / np.linalg.norm(hidden, axis=1) / np.linalg.norm(state)
            scores[token] = (1 - alpha) * p[token] - alpha * cosines.max()
        ids.append(max(scores, key=scores.get))
    return ids[len(prompt) :]


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_tokens_are_those_of_the_formula_for_ragged_prompts(variant):
    config = tiny(max_positions=24, init_std=0.2, **variant)
    model, params = Transformer(config), params_of(config)
    prompts = [row[:n].tolist() for row, n in zip(tokens(rows=3, length=8), (8, 3, 1), strict=True)]
    found = contrastive_search(model, params, prompts, max_tokens=6, k=5, alpha=0.5)
    assert found == [by_hand(model, params, prompt, 6, 5, 0.5) for prompt in prompts]
    assert found != generate(model, params, prompts, max_tokens=6, temperature=0.0)


def test_without_the_likeness_or_with_one_candidate_it_is_greedy_and_ends_at_eot():
    config = tiny(max_positions=40)
    model, params = Transformer(config), params_of(config)
    prompts = [[1, 2, 3], [4]]
    greedy = generate(model, params, prompts, max_tokens=9, temperature=0.0)
    assert contrastive_search(model, params, prompts, max_tokens=9, k=4, alpha=0.0) == greedy
    assert contrastive_search(model, params, prompts, max_tokens=9, k=1, alpha=0.9) == greedy
    eot = greedy[0][4]
    ended = contrastive_search(model, params, prompts, max_tokens=9, alpha=0.0, eot=eot)
    assert ended == [row[: row.index(eot)] if eot in row else row for row in greedy]


def test_mistakes_are_named():
    config = tiny()
    model, params = Transformer(config), params_of(config)
    for given, message in (({"k": 0}, "k is 0"), ({"k": 38}, "k is 38"), ({"alpha": 1.5}, "alpha is 1.5")):
        with pytest.raises(UserError, match=message):
            contrastive_search(model, params, [[1]], max_tokens=2, **given)
    with pytest.raises(UserError, match="do not fit"):
        contrastive_search(model, params, [[1] * 10], max_tokens=5)
