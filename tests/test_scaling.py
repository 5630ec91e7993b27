"""scaling.py: one dial, and rates and deviations that follow the width."""

import re

import jax
import numpy as np
import pytest
from helpers import initial_params, tiny

from gpt_jax.model.config import ModelConfig
from gpt_jax.model.size import count_parameters
from gpt_jax.scaling import dial, groups_of, kind_of, rate_multipliers, scale_initial
from gpt_jax.sharding import path_name


def test_the_dial_sets_everything_in_proportion():
    small, large = dial(2), dial(4)
    for depth, own in ((2, small), (4, large)):
        config = ModelConfig(
            vocab_size=1,
            num_layers=depth,
            d_model=own["model.d_model"],
            num_heads=own["model.num_heads"],
            positions="rope",
        )
        parameters = count_parameters(config) - config.d_model
        tokens = own["steps"] * own["batch_size"] * own["context_length"]
        assert tokens == pytest.approx(20 * parameters, rel=0.01)
        assert config.key_size == 32 and config.d_model == 32 * depth
    assert large["batch_size"] > small["batch_size"]
    assert large["optimizer.learning_rate"] < small["optimizer.learning_rate"]


def test_hidden_matrices_follow_the_width_and_nothing_else_does():
    config = tiny(d_model=32, tie_embeddings=False)
    params = {"model": initial_params(config)}
    rates, scaled = rate_multipliers(params, 32, 8), scale_initial(params, 32, 8)
    seen = set()
    for (path, rate), after, before in zip(
        jax.tree_util.tree_leaves_with_path(rates), jax.tree.leaves(scaled), jax.tree.leaves(params), strict=True
    ):
        name = path_name(path)
        kind = kind_of(name)
        seen.add(kind)
        assert rate == (1.0 if kind == "vector" else 0.25)
        np.testing.assert_allclose(after, before * {"vector": 1.0, "hidden": 0.5, "output": 0.25}[kind], rtol=1e-6)
        assert (kind == "hidden") == name.endswith("kernel") and (kind == "output") == name.endswith("/head")
        found = [factor["lr"] for regex, factor in groups_of(32, 8) if re.fullmatch(regex, name)]
        assert (found or [1.0]) == [rate]
    assert seen == {"vector", "hidden", "output"}


@pytest.mark.parametrize("tied", [False, True])
def test_with_factorised_embeddings_the_projection_from_the_width_is_the_output(tied):
    config = tiny(d_model=32, embedding_size=8, tie_embeddings=tied)
    params = {"model": initial_params(config)}
    rates = {
        path_name(path): rate for path, rate in jax.tree_util.tree_leaves_with_path(rate_multipliers(params, 32, 8))
    }
    outside = {name: rate for name, rate in rates.items() if "/layers/" not in name and not name.endswith("bias")}
    assert {name for name, rate in outside.items() if rate != 1} == {"model/embedding_out/kernel"}
    assert outside["model/embedding_out/kernel"] == 0.25 and outside["model/embedding_in/kernel"] == 1
    assert ("model/head" in outside) != tied
    for name, rate in rates.items():
        found = [factor["lr"] for regex, factor in groups_of(32, 8, factorised=True) if re.fullmatch(regex, name)]
        assert (found or [1.0]) == [rate]
    scaled = scale_initial(params, 32, 8)["model"]
    kernel = scaled["embedding_out"]["kernel"]  # muP: of deviation base^-1/2 at the base width, falling as 1 / width
    assert np.std(kernel) == pytest.approx(8**-0.5 * 8 / 32, rel=0.2)
    for name in ("embedding", "embedding_in", *([] if tied else ["head"])):
        jax.tree.map(np.testing.assert_array_equal, scaled[name], params["model"][name])
