"""How many parameters a model has: from its config, or where a user's block says otherwise, from what is made."""

from __future__ import annotations

import jax

from gpt_jax.model.config import ModelConfig
from gpt_jax.model.transformer import Transformer


def count_parameters(config: ModelConfig) -> int:
    """Returns the number of parameters, padded vocabulary rows excluded and a tied embedding counted once."""
    d, bias = config.d_model, int(config.bias)
    norm = d * (1 + (bias if config.norm == "layernorm" else 0))
    block = 2 * norm + sum(i * o + config.has_bias(name) * o for name, (i, o) in config.products.items())
    if config.qk_norm:
        block += 2 * config.key_size
    if config.talking_heads:
        block += 2 * config.num_heads**2
    for name, sizes in config.products.items():
        block += config.lora_rank * sum(sizes) * config.is_low_rank(name)
    if config.block:
        block = _initialised(config) // config.num_layers
    e = config.embed_size
    total = config.vocab_size * e + config.num_layers * block + norm
    if config.positions == "learned":
        total += config.max_positions * e
    if not config.tie_embeddings:
        total += config.vocab_size * e
    if e != d:
        total += e * d + bias * d + d * e + bias * e
    return total


def _initialised(config: ModelConfig) -> int:
    """The number of parameters of all blocks, as they are made."""
    tokens = jax.ShapeDtypeStruct((1, 1), "int32")
    made = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"]["layers"]
    return sum(leaf.size for leaf in jax.tree.leaves(made))
