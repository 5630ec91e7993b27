"""Llama 2 and 3: RMSNorm, rotary positions (scaled by the rule 'llama3' or linearly), grouped queries, SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.interop.fields import Fields
from gpt_jax.interop.mapping import Family, Tensor, heads, linear
from gpt_jax.model import ModelConfig

_SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3"}


def rope_options(fields: Fields, context: int, base: float) -> dict[str, Any]:
    """Options of rotary positions, of `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    base = fields.number("rope_theta", base)
    table = fields.take("rope_parameters", dict, {}) or fields.take("rope_scaling", dict, {})
    fields.take("rope_scaling", dict, {})
    rope = Fields(table)
    kind = rope.take("rope_type", str, rope.take("type", str, "default"))
    if kind not in _SCALINGS:
        raise UserError(f"config.json has rope_type={kind!r}, which is not supported; allowed: {', '.join(_SCALINGS)}.")
    rope.need("partial_rotary_factor", 1, 1.0)
    options = dict(rope_base=rope.number("rope_theta", base), rope_scaling=_SCALINGS[kind])
    if kind == "default":
        rope.take("factor", (float, int), 1.0)
    else:
        options["rope_factor"] = rope.number("factor")
    if kind == "llama3":
        options["rope_low_frequency"] = rope.number("low_freq_factor")
        options["rope_high_frequency"] = rope.number("high_freq_factor")
        options["rope_original_context"] = rope.take("original_max_position_embeddings", int, context)
    rope.finish()
    return options


def read(tree: Mapping[str, Any]) -> dict[str, Any]:
    fields = Fields(tree)
    options = read_fields(fields)
    biased, mlp_biased = fields.take("attention_bias", bool, False), fields.take("mlp_bias", bool, False)
    if mlp_biased and not biased:
        raise UserError("config.json has mlp_bias=True without attention_bias, which is not supported.")
    options |= dict(bias=mlp_biased, attention_bias=biased)
    fields.finish()
    return options


def read_fields(fields: Fields, base: float = 10000.0) -> dict[str, Any]:
    """The options that Llama and Qwen share."""
    context = fields.take("max_position_embeddings", int)
    num_heads = fields.take("num_attention_heads", int)
    fields.need("hidden_act", "silu", "swish")
    return dict(
        vocab_size=fields.take("vocab_size", int),
        max_positions=context,
        d_model=fields.take("hidden_size", int),
        d_ff=fields.take("intermediate_size", int),
        num_layers=fields.take("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=fields.take("num_key_value_heads", int, num_heads),
        head_dim=fields.take("head_dim", int, 0),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        ffn="swiglu",
        norm="rmsnorm",
        positions="rope",
        **rope_options(fields, context, base),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    return write_fields(config) | dict(
        attention_bias=config.has_bias("qkv"), mlp_bias=config.has_bias("up"), attention_dropout=0.0
    )


def write_fields(config: ModelConfig) -> dict[str, Any]:
    """config.json with rotary positions as older and newer readers look for them."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling != "none":
        rope = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        rope |= dict(
            low_freq_factor=config.rope_low_frequency,
            high_freq_factor=config.rope_high_frequency,
            original_max_position_embeddings=config.rope_original_context,
        )
    return dict(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_positions,
        hidden_size=config.d_model,
        intermediate_size=config.ff_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.key_size,
        hidden_act="silu",
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        rope_theta=config.rope_base,
        rope_scaling=None if config.rope_scaling == "none" else rope,
        rope_parameters=rope | {"rope_theta": config.rope_base},
    )


def misfits(config: ModelConfig, qk_norm: bool = False) -> list[str]:
    wanted = dict(block="", norm="rmsnorm", positions="rope", ffn="swiglu", qk_norm=qk_norm)
    found = [f"{name}={getattr(config, name)!r}" for name, value in wanted.items() if getattr(config, name) != value]
    if config.rope_scaling not in _SCALINGS.values():
        found.append(f"rope_scaling={config.rope_scaling!r}")
    return found


def tensors(config: ModelConfig) -> list[Tensor]:
    block, ours = "model.layers.{}.", "layers/"
    rows = [
        Tensor("model.embed_tokens.weight", "embedding", vocabulary=True),
        Tensor("model.norm.weight", "final_norm/scale"),
        Tensor(f"{block}input_layernorm.weight", f"{ours}attention_norm/scale"),
        Tensor(f"{block}post_attention_layernorm.weight", f"{ours}mlp_norm/scale"),
    ]
    for letter, (product, part) in heads(config).items():
        name = f"{block}self_attn.{letter}_proj"
        rows += linear(name, f"{ours}attention/{product}", (1, 2), part, config.has_bias(product))
    rows += linear(f"{block}self_attn.o_proj", f"{ours}attention/out", (2, 1), bias=config.has_bias("out"))
    for part, name in enumerate(("gate_proj", "up_proj")):
        rows += linear(f"{block}mlp.{name}", f"{ours}mlp/up", (1, 1), part, config.has_bias("up"))
    rows += linear(f"{block}mlp.down_proj", f"{ours}mlp/down", (1, 1), bias=config.has_bias("down"))
    return rows if config.tie_embeddings else [*rows, Tensor("lm_head.weight", "head", vocabulary=True)]


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    ignored=r".*\.rotary_emb\.inv_freq",
    tensors=tensors,
    read=read,
    write=write,
    misfits=misfits,
)
