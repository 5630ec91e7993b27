"""GPT-2: LayerNorm, learned positions, biases; kernels [in, out], queries, keys and values in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpt_jax.interop.fields import Fields
from gpt_jax.interop.mapping import Family, Tensor
from gpt_jax.model import ModelConfig

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"}
_IGNORED = (
    *("n_ctx", "resid_pdrop", "embd_pdrop", "attn_pdrop", "reorder_and_upcast_attn", "gradient_checkpointing"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
)


def read(tree: Mapping[str, Any]) -> dict[str, Any]:
    fields = Fields(tree, _IGNORED)
    fields.need("scale_attn_weights", True)
    fields.need("scale_attn_by_inverse_layer_idx", False)
    fields.need("add_cross_attention", False)
    options = dict(
        vocab_size=fields.take("vocab_size", int, 50257),
        max_positions=fields.take("n_positions", int, 1024),
        d_model=fields.take("n_embd", int, 768),
        num_layers=fields.take("n_layer", int, 12),
        num_heads=fields.take("n_head", int, 12),
        d_ff=fields.take("n_inner", int, 0),
        ffn=fields.choose("activation_function", _ACTIVATIONS, "gelu_new"),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        tie_embeddings=fields.take("tie_word_embeddings", bool, True),
        norm="layernorm",
        positions="learned",
        bias=True,
    )
    fields.finish()
    return options


def write(config: ModelConfig) -> dict[str, Any]:
    return dict(
        vocab_size=config.vocab_size,
        n_positions=config.max_positions,
        n_ctx=config.max_positions,
        n_embd=config.d_model,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_inner=config.ff_size,
        activation_function=next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.ffn),
        layer_norm_epsilon=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
    )


def misfits(config: ModelConfig) -> list[str]:
    wanted = dict(block="", norm="layernorm", positions="learned", qk_norm=False)
    found = [f"{name}={getattr(config, name)!r}" for name, value in wanted.items() if getattr(config, name) != value]
    if config.ffn not in _ACTIVATIONS.values():
        found.append(f"ffn={config.ffn!r}")
    if config.kv_heads != config.num_heads:
        found.append(f"num_kv_heads={config.num_kv_heads}")
    if config.key_size * config.num_heads != config.d_model:
        found.append(f"head_dim={config.key_size}")
    return found


def tensors(config: ModelConfig) -> list[Tensor]:
    D, F = config.d_model, config.ff_size

    def bias(name: str, leaf: str, last: int = 1, size: int = D, has: bool = config.bias) -> Tensor:
        return Tensor(name, leaf, last=last) if has else Tensor(name, shape=(size,))

    block, ours = "transformer.h.{}.", "layers/"
    rows = [
        Tensor("transformer.wte.weight", "embedding", vocabulary=True),
        Tensor("transformer.wpe.weight", "position_embedding"),
        Tensor("transformer.ln_f.weight", "final_norm/scale"),
        bias("transformer.ln_f.bias", "final_norm/bias"),
        Tensor(f"{block}ln_1.weight", f"{ours}attention_norm/scale"),
        bias(f"{block}ln_1.bias", f"{ours}attention_norm/bias"),
        Tensor(f"{block}attn.c_attn.weight", f"{ours}attention/qkv/kernel", last=3),
        bias(f"{block}attn.c_attn.bias", f"{ours}attention/qkv/bias", 3, 3 * D, config.has_bias("qkv")),
        Tensor(f"{block}attn.c_proj.weight", f"{ours}attention/out/kernel"),
        bias(f"{block}attn.c_proj.bias", f"{ours}attention/out/bias", has=config.has_bias("out")),
        Tensor(f"{block}ln_2.weight", f"{ours}mlp_norm/scale"),
        bias(f"{block}ln_2.bias", f"{ours}mlp_norm/bias"),
        Tensor(f"{block}mlp.c_fc.weight", f"{ours}mlp/up/kernel"),
        bias(f"{block}mlp.c_fc.bias", f"{ours}mlp/up/bias", size=F),
        Tensor(f"{block}mlp.c_proj.weight", f"{ours}mlp/down/kernel"),
        bias(f"{block}mlp.c_proj.bias", f"{ours}mlp/down/bias"),
    ]
    return rows if config.tie_embeddings else [*rows, Tensor("lm_head.weight", "head", vocabulary=True)]


GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    ignored=r".*\.attn\.(bias|masked_bias)",
    tensors=tensors,
    read=read,
    write=write,
    misfits=misfits,
)
