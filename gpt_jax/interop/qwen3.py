"""Qwen3, dense: Llama's blocks with an RMSNorm of queries and keys per head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.interop import llama
from gpt_jax.interop.fields import Fields
from gpt_jax.interop.mapping import Family, Tensor
from gpt_jax.model import ModelConfig


def read(tree: Mapping[str, Any]) -> dict[str, Any]:
    fields = Fields(tree, ("sliding_window", "max_window_layers"))  # of no consequence unless use_sliding_window
    fields.need("use_sliding_window", False)
    kinds = fields.take("layer_types", list, [])
    if odd := [kind for kind in kinds if kind != "full_attention"]:
        raise UserError(f"config.json has layer_types with {odd[0]!r}, which is not supported.")
    options = llama.read_fields(fields) | dict(qk_norm=True)
    options["head_dim"] = options["head_dim"] or 128  # its default, whatever the width
    options |= dict(bias=False, attention_bias=fields.take("attention_bias", bool, False))
    fields.finish()
    return options


def write(config: ModelConfig) -> dict[str, Any]:
    return llama.write_fields(config) | dict(
        attention_bias=config.has_bias("qkv"), use_sliding_window=False, attention_dropout=0.0
    )


def misfits(config: ModelConfig) -> list[str]:
    return llama.misfits(config, qk_norm=True) + (["bias=True"] if config.bias else [])


def tensors(config: ModelConfig) -> list[Tensor]:
    norms = [
        Tensor(f"model.layers.{{}}.self_attn.{letter}_norm.weight", f"layers/attention/{letter}_norm/scale")
        for letter in "qk"
    ]
    return llama.tensors(config) + norms


QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    ignored=r".*\.rotary_emb\.inv_freq",
    tensors=tensors,
    read=read,
    write=write,
    misfits=misfits,
)
