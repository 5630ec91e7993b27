"""What a model is: shapes, variants and execution choices. Plain data, hashable, checked when made."""

from __future__ import annotations

import dataclasses
import math
import re
import sys

from gpt_jax.errors import UserError, choose
from gpt_jax.model.positions import RopeScaling
from gpt_jax.options import option

FFNS = ("gelu_tanh", "gelu", "relu_tanh", "relu2", "swiglu")
POSITIONS = ("learned", "rope", "alibi", "none")
ROPE_SCALINGS = ("none", "linear", "ntk", "llama3")
LAYER_KINDS = ("dense", "band")
ATTENTIONS = ("auto", "blocks", "dense", "chunks", "splash", "cudnn")
# What an implementation of attention does not support; those not named here support everything.
LACKS = {
    "splash": ("prefix masks", "alibi", "talking_heads", "dropout", "lengths of a device that 128 does not divide"),
    "cudnn": (
        "prefix masks",
        "documents kept apart",
        "alibi",
        "attention_softcap",
        "talking_heads",
        "dropout",
        "a window that looks ahead",
        "head sizes that 8 does not divide",
        "head sizes above 128 (256 from Hopper on)",
        "a sequence that the mesh cuts",
        "float32",
    ),
}
REMATS = ("none", "full", "dots", "dots_no_batch", "offload_dots")
DTYPES = ("float32", "bfloat16", "float16")
_LEAST = (
    (("num_layers", "d_model", "num_heads", "window", "query_block", "vocab_multiple", "rope_factor"), 1, "at least 1"),
    (("rope_base", "norm_eps"), sys.float_info.min, "above 0"),
    (("num_kv_heads", "head_dim", "d_ff", "embedding_size"), 0, "0 (which derives it) or more"),
    (("vocab_size", "max_positions"), 0, "0 (which takes the run's) or more"),
    (("unroll", "logit_softcap", "attention_softcap", "init_std"), 0, "0 or more"),
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder stack. Zeros mean 'derive it': see `kv_heads`, `key_size` and `ff_size`."""

    vocab_size: int = option(0, "tokens in the vocabulary; 0 takes the tokenizer's")
    num_layers: int = option(4, "blocks")
    d_model: int = option(192, "width of the residual stream")
    embedding_size: int = option(0, "width of the embeddings, projected to d_model and back (ALBERT); 0: d_model")
    num_heads: int = option(4, "attention heads")
    num_kv_heads: int = option(0, "heads of keys and values (GQA; 1 is MQA); 0: num_heads")
    head_dim: int = option(0, "size of a head; 0: d_model / num_heads")
    head_dims: tuple[int, ...] = option((), "size of each head where they differ (the article's 'different sizes')")
    block: str = option("", "import path of a block in place of the built-in one (package.module:Block)")
    d_ff: int = option(0, "width of the feed-forward layer; 0: 4 d_model (swiglu: 8/3 d_model, rounded up to 64)")
    max_positions: int = option(0, "learned positions; 0: context_length")
    ffn: str = option("gelu_tanh", " | ".join(FFNS))
    norm: str = option("layernorm", "layernorm | rmsnorm")
    norm_eps: float = option(1e-5, "epsilon of the normalisation")
    bias: bool = option(True, "biases in products and norms")
    attention_bias: bool = option(False, "biases in the products of attention, where bias is off")
    positions: str = option("learned", " | ".join(POSITIONS))
    rope_base: float = option(10000.0, "base of the rotary frequencies")
    rope_scaling: str = option("none", " | ".join(ROPE_SCALINGS) + ": reading more than the trained context")
    rope_factor: float = option(1.0, "rope_scaling: by how much the context grows")
    rope_low_frequency: float = option(1.0, "llama3: waves that rope_original_context holds fewer of are interpolated")
    rope_high_frequency: float = option(4.0, "llama3: waves that it holds more of stay as they are")
    rope_original_context: int = option(8192, "llama3: context before it grew")
    tie_embeddings: bool = option(True, "the output layer is the transposed embedding")
    pattern: tuple[str, ...] = option(("dense",), "repeating kinds of layers: dense | band, e.g. ('dense', 'band')")
    window: int = option(256, "band layers: keys a query sees, itself included")
    qk_norm: bool = option(False, "RMSNorm of queries and keys per head")
    logit_softcap: float = option(0.0, "c tanh(logits / c) on the output; 0 is off")
    attention_softcap: float = option(0.0, "the same on attention scores; 0 is off")
    talking_heads: bool = option(False, "H x H mixing of attention scores and weights (Shazeer 2020), identity at init")
    dropout: float = option(0.0, "rate on embeddings, attention weights and residual branches")
    init_std: float = option(0.02, "standard deviation of the initial weights; learned positions: half of it")
    scale_residual_init: bool = option(True, "residual projections start 1/sqrt(2 num_layers) smaller (GPT-2)")
    vocab_multiple: int = option(128, "the embedding is stored padded to a multiple of this")
    dtype: str = option("float32", "of activations and products: " + " | ".join(DTYPES))
    param_dtype: str = option("float32", "of stored parameters")
    attention: str = option("auto", " | ".join(ATTENTIONS) + " (gpt_jax/model/implementations.py)")
    query_block: int = option(128, "queries in a block (blocks, chunks)")
    flatten: bool = option(True, "products over [B*T, D]; False keeps [B, T, D] (a sharded sequence axis)")
    unroll: int = option(0, "layers unrolled per iteration of the loop over layers; 0 unrolls all")
    remat: str = option("none", " | ".join(REMATS))
    lora_rank: int = option(0, "LoRA: rank of what is added to the products that lora_targets names; 0 is off")
    lora_alpha: float = option(16.0, "LoRA: W + (lora_alpha / lora_rank) A B")
    lora_targets: str = option("qkv|q|kv", "LoRA: regex over products: qkv (or q, kv), out, up, down")
    lora_freeze: bool = option(True, "LoRA: train A, B and heads only; False trains the model's other weights too")

    def __post_init__(self) -> None:
        choose("ffn", self.ffn, FFNS)
        choose("norm", self.norm, ("layernorm", "rmsnorm"))
        choose("positions", self.positions, POSITIONS)
        choose("rope_scaling", self.rope_scaling, ROPE_SCALINGS)
        choose("attention", self.attention, ATTENTIONS)
        choose("remat", self.remat, REMATS)
        choose("dtype", self.dtype, DTYPES)
        choose("param_dtype", self.param_dtype, DTYPES)
        for kind in self.pattern:
            choose("pattern", kind, LAYER_KINDS)
        if self.block and ":" not in self.block:
            raise UserError(f"block is {self.block!r}; it is an import path (package.module:Block), or empty.")
        for names, least, allowed in _LEAST:
            for name in names:
                if not least <= getattr(self, name) < math.inf:
                    raise UserError(f"{name} is {getattr(self, name)}; it must be {allowed}.")
        if not self.pattern or self.num_layers % len(self.pattern):
            raise UserError(
                f"num_layers is {self.num_layers}, not a multiple of the length of pattern {self.pattern!r}."
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; it must be in [0, 1).")
        if self.head_dims:
            if len(self.head_dims) != self.num_heads:
                raise UserError(f"head_dims has {len(self.head_dims)} sizes for num_heads={self.num_heads}.")
            if min(self.head_dims) < 1:
                raise UserError(f"head_dims is {self.head_dims}; each size must be at least 1.")
            if sum(self.head_dims) != self.d_model:
                raise UserError(f"head_dims sums to {sum(self.head_dims)}; it must be d_model={self.d_model}.")
            if self.num_kv_heads not in (0, self.num_heads) or self.positions == "rope" or self.qk_norm:
                raise UserError("head_dims goes with neither num_kv_heads, rope nor qk_norm.")
        elif not self.head_dim and self.d_model % self.num_heads:
            raise UserError(
                f"num_heads is {self.num_heads}, which does not divide d_model={self.d_model}; "
                "choose a divisor or set head_dim."
            )
        if self.num_heads % self.kv_heads:
            raise UserError(f"num_kv_heads is {self.num_kv_heads}, which does not divide num_heads={self.num_heads}.")
        if self.positions == "rope" and self.key_size % 2:
            raise UserError(f"rope needs an even head_dim, not {self.key_size}.")
        if self.rope_scaling != "none" and self.positions != "rope":
            raise UserError(f"rope_scaling is {self.rope_scaling!r}, but positions is {self.positions!r}, not 'rope'.")
        if not 0 < self.rope_low_frequency < self.rope_high_frequency or self.rope_original_context < 1:
            raise UserError(
                f"rope_low_frequency={self.rope_low_frequency}, rope_high_frequency={self.rope_high_frequency} and "
                f"rope_original_context={self.rope_original_context} must be positive, the first less than the second."
            )
        if self.lora_rank:
            self._check_lora()
        uses = {
            "alibi": self.positions == "alibi",
            "attention_softcap": self.attention_softcap,
            "talking_heads": self.talking_heads,
            "dropout": self.dropout,
            "float32": self.dtype == "float32",
        }
        for what in LACKS.get(self.attention, ()):
            if uses.get(what):
                raise UserError(f"attention is {self.attention!r}, which does not support {what}; choose another.")

    def _check_lora(self) -> None:
        try:
            found = [name for name in self.products if re.fullmatch(self.lora_targets, name)]
        except re.error as error:
            raise UserError(f"lora_targets is {self.lora_targets!r}, which is no regex: {error}.") from None
        if not found or self.lora_rank < 1:
            raise UserError(
                f"lora_rank is {self.lora_rank} and lora_targets {self.lora_targets!r}: the rank must be at least 1, "
                f"and the regex match one of {', '.join(self.products)}."
            )

    def is_low_rank(self, product: str) -> bool:
        """Whether LoRA adds to the product of this name."""
        return bool(self.lora_rank and product in self.products and re.fullmatch(self.lora_targets, product))

    def has_bias(self, product: str | None) -> bool:
        """Whether the product of this name has a bias."""
        return self.bias or (self.attention_bias and product in ("qkv", "q", "kv", "out"))

    @property
    def rope(self) -> RopeScaling:
        return RopeScaling(
            self.rope_scaling,
            self.rope_factor,
            self.rope_low_frequency,
            self.rope_high_frequency,
            self.rope_original_context,
        )

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """The products of a block by name: sizes of input and output."""
        d, f = self.d_model, self.ff_size
        q, kv = self.num_heads * self.key_size, self.kv_heads * self.key_size
        if self.head_dims:
            q = kv = d
        heads = {"qkv": (d, 3 * q)} if self.kv_heads == self.num_heads else {"q": (d, q), "kv": (d, 2 * kv)}
        return {**heads, "out": (q, d), "up": (d, 2 * f if self.ffn == "swiglu" else f), "down": (f, d)}

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer."""
        return self.pattern * (self.num_layers // len(self.pattern))

    @property
    def embed_size(self) -> int:
        """Width of the embeddings."""
        return self.embedding_size or self.d_model

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def key_size(self) -> int:
        """Size of a head; with `head_dims`, of the largest."""
        if self.head_dims:
            return max(self.head_dims)
        return self.head_dim or self.d_model // self.num_heads

    @property
    def ff_size(self) -> int:
        if self.d_ff:
            return self.d_ff
        if self.ffn == "swiglu":
            return -(-8 * self.d_model // 3 // 64) * 64
        return 4 * self.d_model

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
