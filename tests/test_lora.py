"""LoRA: nothing at first, W + (alpha / r) A B after it, the base untouched, and moments of A and B only."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import apply_of, assert_trees_equal, initial_params, params_of, text_batch, tiny, tokens
from training import train

from gpt_jax.config import resolve
from gpt_jax.config_changes import IMPOSSIBLE, NUMERICS, classify
from gpt_jax.errors import UserError
from gpt_jax.model import Transformer, count_parameters
from gpt_jax.model.lora import LORA_BASE, merge_lora
from gpt_jax.objectives.causal_lm import CausalLM
from gpt_jax.run import build_run
from gpt_jax.sharding import path_name
from gpt_jax.testing import check_objective
from gpt_jax.testing_models import check_module

EVERYWHERE = dict(lora_rank=3, lora_alpha=6.0, lora_targets=".*")
VARIANTS = {
    "plain": {},
    "grouped queries, swiglu": dict(num_kv_heads=2, ffn="swiglu", d_ff=24, norm="rmsnorm", bias=False, qk_norm=True),
    "unequal heads, untied, two kinds of layers": dict(
        head_dims=(2, 6, 4, 4), tie_embeddings=False, pattern=("dense", "band"), window=3
    ),
}


def names_of(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def by_hand(params, scale):
    """W + scale A B of every layer, by a loop over layers."""
    if "lora_a" not in params:
        return {name: by_hand(child, scale) if isinstance(child, dict) else child for name, child in params.items()}
    kernels = []
    for kernel, a, b in zip(params["kernel"], params["lora_a"], params["lora_b"], strict=True):
        low = np.tensordot(np.asarray(a, np.float64), np.asarray(b, np.float64), axes=1)
        kernels.append(kernel + scale * low)
    rest = {name: leaf for name, leaf in params.items() if name == "bias"}
    return {"kernel": np.stack(kernels).astype(np.float32), **rest}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_model_is_at_first_the_base_bit_for_bit(variant):
    base, config = tiny(**variant), tiny(**variant, **EVERYWHERE)
    params = initial_params(config)
    stripped, plain = merge_lora(params, config)
    assert plain.lora_rank == 0
    assert_trees_equal(
        {n: x for n, x in names_of(params).items() if "lora" not in n}, names_of(stripped)
    )  # B is 0: merging changes nothing
    logits = apply_of(config)(params, tokens()).logits
    np.testing.assert_array_equal(logits, apply_of(base)(stripped, tokens()).logits)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_merged_weights_give_the_adapted_models_logits(variant):
    config = tiny(**variant, **EVERYWHERE)
    params = params_of(config)
    merged, plain = merge_lora(params, config)
    adapted = apply_of(config)(params, tokens()).logits
    np.testing.assert_allclose(apply_of(plain)(merged, tokens()).logits, adapted, rtol=1e-5, atol=1e-5)
    expected = by_hand(params, 6.0 / 3)
    for name, leaf in names_of(merged).items():
        np.testing.assert_allclose(leaf, names_of(expected)[name], rtol=1e-5, atol=1e-6, err_msg=name)
    without = {name: jnp.zeros_like(x) if name.endswith("lora_b") else x for name, x in names_of(params).items()}
    tree = jax.tree_util.tree_map_with_path(lambda path, x: without[path_name(path)], params)
    assert np.abs(np.asarray(apply_of(config)(tree, tokens()).logits - adapted)).max() > 1e-2  # A B does something


@pytest.mark.parametrize("targets", ["qkv|q|kv", "out|down", ".*"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_pair_of_factors_stands_beside_each_product_named_and_is_counted(variant, targets):
    config = tiny(**variant, lora_rank=2, lora_targets=targets)
    names = names_of(params_of(config))
    for name in [n for n in names if n.endswith("kernel")]:
        product = name.split("/")[-2]
        has = name.replace("kernel", "lora_a") in names and name.replace("kernel", "lora_b") in names
        assert has == bool(re.fullmatch(targets, product)), name
    padding = (config.padded_vocab - config.vocab_size) * config.d_model * (1 if config.tie_embeddings else 2)
    assert count_parameters(config) == sum(x.size for x in names.values()) - padding


def test_cached_decoding_adds_the_low_rank_part_too():
    check_module(tiny(**EVERYWHERE))


def test_the_base_is_frozen_and_the_optimizer_keeps_moments_of_the_factors_only():
    config = tiny(lora_rank=3, lora_targets="qkv|out")
    objective, batches = CausalLM(Transformer(config)), [text_batch(seed=s) for s in range(3)]
    groups = ((LORA_BASE, {"frozen": True}),)
    state, metrics = train(objective, batches, rate=0.1, weight_decay=0.1, groups=groups)
    fresh, _ = train(objective, batches[:1], rate=0.0, groups=groups)
    assert_trees_equal(state.frozen, fresh.frozen)
    trained, start = names_of(state.params), names_of(fresh.params)
    assert set(trained) == {
        f"model/layers/block_0/attention/{product}/lora_{part}" for product in ("qkv", "out") for part in "ab"
    }
    for name, leaf in trained.items():
        assert (np.asarray(leaf) != np.asarray(start[name])).all(), name
    assert metrics[-1]["loss"] != metrics[0]["loss"]
    moments = [leaf for name, leaf in names_of(state.opt_state).items() if name.endswith(("lora_a", "lora_b"))]
    everything = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(x.size for x in moments) == sum(x.size for x in everything)
    d, r, layers = config.d_model, 3, config.num_layers
    out = [leaf.size for name, leaf in names_of(state.opt_state).items() if "attention/out" in name]
    assert sum(out) == 2 * layers * 2 * r * d  # two moments of 2 r d for each layer's d x d matrix


def run_config(**model):
    return resolve(
        {
            "steps": 2,
            "batch_size": 8,
            "context_length": 24,
            "model": dict(num_layers=1, d_model=16, num_heads=2, vocab_multiple=8, **model),
            "objective": {"name": "classify"},
            "data": {"tasks": ("toy_tasks:colours",), "tokenizer": {"kind": "byte"}},
        }
    )


def test_a_run_with_lora_trains_factors_and_heads_unless_the_config_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_JAX_CACHE", str(tmp_path))
    step = build_run(run_config(lora_rank=2), log=lambda line: None).step
    assert set(names_of(step.abstract.params)) == {
        "model/layers/block_0/attention/qkv/lora_a",
        "model/layers/block_0/attention/qkv/lora_b",
        "classifier/kernel",
        "classifier/bias",
    }
    assert {"model/embedding", "model/layers/block_0/attention/qkv/kernel"} <= set(names_of(step.abstract.frozen))
    step = build_run(run_config(lora_rank=2, lora_freeze=False), log=lambda line: None).step
    assert not names_of(step.abstract.frozen)


def test_causal_lm_with_lora_keeps_the_contract():
    check_objective(CausalLM(Transformer(tiny(num_layers=1, dropout=0.1, **EVERYWHERE))), text_batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lora_rank=-1), "lora_rank is -1 and .*: the rank must be at least 1"),
        (dict(lora_rank=2, lora_targets="queries"), "the regex match one of qkv, out, up, down"),
        (dict(lora_rank=2, lora_targets="qkv", num_kv_heads=2), "the regex match one of q, kv, out, up, down"),
        (dict(lora_rank=2, lora_targets="(qkv"), "which is no regex"),
    ],
)
def test_ranks_and_targets_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)


def test_what_may_change_when_a_run_is_continued():
    for key in ("lora_rank", "lora_targets", "lora_freeze"):
        assert classify(f"model.{key}")[0] == IMPOSSIBLE
    assert classify("model.lora_alpha")[0] == NUMERICS
