"""Continuous batching gives each request the tokens it gets alone, whoever is in the batch and whenever it came in."""

import numpy as np
import pytest
from helpers import VOCAB, params_of, tiny

from gpt_jax.continuous import generate_continuously
from gpt_jax.errors import UserError
from gpt_jax.generation import generate
from gpt_jax.model import Transformer
from gpt_jax.sampling import Sampling


def prompts_of(count, seed=0, longest=12):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, rng.integers(1, longest)).tolist() for _ in range(count)]


def continuous(model, params, prompts, **settings):
    found = list(generate_continuously(model, params, prompts, **settings))
    order = [index for index, _, _ in found]
    assert sorted(order) == list(range(len(prompts)))
    by_index = sorted(found)
    return [ids for _, ids, _ in by_index], [values for _, _, values in by_index], order


VARIANTS = {
    "learned": {"max_positions": 40},
    "banded": {"pattern": ("dense", "band"), "window": 3, "positions": "rope", "max_positions": 40},
    "grouped": {"num_kv_heads": 2, "positions": "alibi", "max_positions": 40},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_greedy_texts_are_those_of_fixed_batches(variant):
    config = tiny(init_std=0.2, **variant)
    model, params = Transformer(config), params_of(config)
    prompts = prompts_of(11)
    free = generate(model, params, prompts, max_tokens=20, temperature=0.0)
    eot = max(range(VOCAB), key=lambda t: sum(t in row and 0 < row.index(t) < 19 for row in free))
    expected, scores = generate(model, params, prompts, max_tokens=20, temperature=0.0, eot=eot, logprobs=True)
    assert len({len(row) for row in expected}) > 2  # they end at different times
    found, values, order = continuous(model, params, prompts, max_tokens=20, sampling=Sampling(0.0), eot=eot, rows=3)
    assert found == expected and order != sorted(order)
    for a, b in zip(values, scores, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_drawn_texts_depend_on_the_seed_alone():
    config = tiny(positions="rope", max_positions=64)
    model, params = Transformer(config), params_of(config)
    prompts, seeds = prompts_of(9, seed=1), list(range(50, 59))
    settings = dict(temperature=0.9, top_p=0.8, repetition_penalty=1.3)
    expected = generate(model, params, prompts, max_tokens=18, seeds=seeds, **settings)
    sampling = Sampling(0.9, top_p=0.8, repetition_penalty=1.3)
    for rows in (2, 5):
        found, _, _ = continuous(model, params, prompts, max_tokens=18, sampling=sampling, seeds=seeds, rows=rows)
        assert found == expected


def test_a_text_that_is_stopped_makes_room():
    config = tiny(positions="rope", max_positions=64)
    model, params = Transformer(config), params_of(config)
    prompts = prompts_of(6, seed=2)
    whole = generate(model, params, prompts, max_tokens=40, temperature=0.0)
    seen = {}

    def ended(index, fresh):
        seen[index] = seen.get(index, []) + fresh
        return index % 2 == 0

    found, _, _ = continuous(model, params, prompts, max_tokens=40, sampling=Sampling(0.0), rows=2, ended=ended)
    for index, row in enumerate(found):
        assert row == whole[index][: len(row)] == seen[index]
        assert len(row) == (1 if index % 2 == 0 else 40)


def test_mistakes_and_nothing_at_all():
    config = tiny()
    model, params = Transformer(config), params_of(config)
    assert list(generate_continuously(model, params, [], max_tokens=4)) == []
    with pytest.raises(UserError, match="rows is 0"):
        list(generate_continuously(model, params, [[1]], max_tokens=4, rows=0))
    with pytest.raises(UserError, match="do not fit the model's 12"):
        list(generate_continuously(model, params, [[1] * 9], max_tokens=4))
