"""The pieces of a block: products, norms, the feed-forward layer, self-attention. Flax Linen, used purely.

Products flatten [B, T, D] to [B*T, D]: the gradient of a 3-D contraction costs transposed copies that a 2-D one does
not (the largest single effect on CPU). Every parameter names its logical axes; sharding rules map them to a mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from gpt_jax.model.attention import Mask, Variant, attend_cache, attention_weights
from gpt_jax.model.cache import Cache
from gpt_jax.model.config import ModelConfig
from gpt_jax.model.decoding import Transposed
from gpt_jax.model.derivatives import add_bias, gelu_tanh, multiply, multiply_gelu, normalize
from gpt_jax.model.implementations import run_attention
from gpt_jax.model.positions import rotate
from gpt_jax.model.random import dropout, fold_name
from gpt_jax.model.taps import Taps


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    return jnp.dtype(config.dtype)


class Product(nn.Module):
    """x [..., in] @ kernel [in, *out] + bias, with `in_dims` trailing input axes contracted.

    Where the config gives it a low rank (LoRA, Hu et al. 2021), (alpha / rank) x @ A @ B is added, B being 0 at first.

    Attributes:
      shape: shape of the kernel, input axes first. `axes`: its logical axes. `in_dims`: number of input axes.
      product: of x and the kernel.
    """

    config: ModelConfig
    shape: Sequence[int]
    axes: Sequence[str | None]
    in_dims: int = 1
    std: float = 0.02
    bias: bool = True
    product: Callable[[Array, Array], Array] = multiply

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, n = self.config, self.in_dims
        dtype = compute_dtype(config)
        kernel = self._kernel(dtype)
        out_shape, lead = tuple(self.shape[n:]), x.shape[: x.ndim - n]
        if config.flatten:
            x = x.reshape((-1, *x.shape[x.ndim - n :]))
        if n > 1:  # merge the input axes, e.g. heads x head_dim
            x = x.reshape((*x.shape[: x.ndim - n], -1))
            kernel = kernel if isinstance(kernel, Transposed) else kernel.reshape((-1, *out_shape))
        y = self.product(x.astype(dtype), kernel)
        if config.is_low_rank(self.name):
            y = y + self._low_rank(x.astype(dtype)).reshape(y.shape)
        if self.bias and config.has_bias(self.name):
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, tuple(self.axes[n:]))
            y = add_bias(y, self.param("bias", zeros, out_shape, config.param_dtype))
        return y.reshape((*lead, *out_shape))

    def _kernel(self, dtype: jnp.dtype) -> Array | Transposed:
        if self.has_variable("params", "kernel"):
            prepared = self.get_variable("params", "kernel")
            if isinstance(prepared, Transposed):  # of `decoding_params`
                return prepared
        normal = nn.with_logical_partitioning(nn.initializers.normal(self.std), tuple(self.axes))
        return self.param("kernel", normal, tuple(self.shape), self.config.param_dtype).astype(dtype)

    def _low_rank(self, x: Array) -> Array:
        """(alpha / rank) x @ A @ B of x [..., in], its output axes in one."""
        config, n = self.config, self.in_dims
        inputs, outputs, rank = tuple(self.shape[:n]), tuple(self.shape[n:]), config.lora_rank
        normal, zeros = nn.initializers.normal(x.shape[-1] ** -0.5), nn.initializers.zeros
        partitioned = nn.with_logical_partitioning
        axes_a, axes_b = (*self.axes[:n], None), (None, *self.axes[n:])
        a = self.param("lora_a", partitioned(normal, axes_a), (*inputs, rank), config.param_dtype).astype(x.dtype)
        b = self.param("lora_b", partitioned(zeros, axes_b), (rank, *outputs), config.param_dtype).astype(x.dtype)
        return (x @ a.reshape(-1, rank)) @ b.reshape(rank, -1) * config.lora_scale


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, in float32 inside."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, bias = self.config, None
        center = config.norm == "layernorm"
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", ones, x.shape[-1:], config.param_dtype)
        if center and config.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
            bias = self.param("bias", zeros, x.shape[-1:], config.param_dtype)
        rows = x.reshape(-1, x.shape[-1]) if config.flatten else x
        return normalize(rows, scale, bias, config.norm_eps, center).astype(compute_dtype(config)).reshape(x.shape)


def residual_std(config: ModelConfig) -> float:
    """Standard deviation of projections that write to the residual stream (GPT-2: 1/sqrt(2 L) smaller)."""
    return config.init_std * ((2 * config.num_layers) ** -0.5 if config.scale_residual_init else 1.0)


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_tanh": gelu_tanh,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu_tanh": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu": jax.nn.silu,
}


class MLP(nn.Module):
    """W2 act(W1 x); swiglu multiplies by a second W1 (Shazeer 2020); relu_tanh is the article's tanh(W2 relu(W1 x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: Array) -> Array:
        config = self.config
        D, F = config.d_model, config.ff_size
        act, product = _ACTIVATIONS[config.ffn], multiply
        if config.ffn == "swiglu":
            both = Product(config, (D, 2, F), ("embed", None, "mlp"), std=config.init_std, name="up")(x_BxTxD)
            h = act(both[..., 0, :]) * both[..., 1, :]
        else:
            h = Product(config, (D, F), ("embed", "mlp"), std=config.init_std, name="up")(x_BxTxD)
            if config.ffn == "gelu_tanh" and not config.is_low_rank("down"):
                product = multiply_gelu
            else:
                h = act(h)
        y = Product(config, (F, D), ("mlp", "embed"), std=residual_std(config), product=product, name="down")(h)
        return jnp.tanh(y) if config.ffn == "relu_tanh" else y


class Attention(nn.Module):
    """Multi-head self-attention of one layer, over the sequence itself or over a cache."""

    config: ModelConfig
    kind: str

    @nn.compact
    def __call__(
        self,
        x_BxTxD: Array,
        layer: Array,
        positions: Array,
        mask: Mask,
        cache: Cache | None,
        keys_B: Array | None,
        taps: Taps | None = None,
    ) -> tuple[Array, Cache | None, dict[str, Array]]:
        config, found = self.config, {}
        D, H, K = config.d_model, config.num_heads, config.key_size
        q, k, v = self._project(x_BxTxD)
        if config.qk_norm:
            axis = nn.with_logical_partitioning(nn.initializers.ones, ("head_dim",))
            kwargs = dict(epsilon=config.norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, scale_init=axis)
            q, k = nn.RMSNorm(name="q_norm", **kwargs)(q), nn.RMSNorm(name="k_norm", **kwargs)(k)
        if config.positions == "rope":
            q, k = (rotate(x, positions, config.rope_base, config.rope) for x in (q, k))
        variant = self._variant(keys_B)
        if cache is None:
            name = "blocks" if self.is_initializing() else config.attention  # parameters do not depend on it
            out = run_attention(q, k, v, mask, variant, name=name, block=config.query_block)
        else:
            cache = cache.write(layer, k, v)
            causal = mask.kind == "causal"
            out = attend_cache(q, *cache.read(layer), positions, cache.positions(layer), variant, causal=causal)
        if taps is not None:
            if "attention" in taps.collect:
                found["attention"] = attention_weights(q, k, mask, variant)
            found["heads"] = out = taps.through_heads(out)
        std = residual_std(config)
        if config.head_dims:
            flat = jnp.concatenate([out[:, :, h, :size] for h, size in enumerate(config.head_dims)], axis=-1)
            return Product(config, (D, D), ("heads", "embed"), std=std, name="out")(flat), cache, found
        project = Product(config, (H, K, D), ("heads", "head_dim", "embed"), in_dims=2, std=std, name="out")
        return project(out), cache, found

    def _project(self, x: Array) -> tuple[Array, Array, Array]:
        config = self.config
        D, H, G, K = config.d_model, config.num_heads, config.kv_heads, config.key_size
        std = config.init_std
        if config.head_dims:
            return self._project_unequal(x)
        if G == H:
            axes = ("embed", None, "heads", "head_dim")
            qkv = Product(config, (D, 3, H, K), axes, std=std, name="qkv")(x)
            return tuple(jnp.squeeze(part, -3) for part in lax.split(qkv, (1, 1, 1), axis=qkv.ndim - 3))
        q = Product(config, (D, H, K), ("embed", "heads", "head_dim"), std=std, name="q")(x)
        kv = Product(config, (D, 2, G, K), ("embed", None, "kv_heads", "head_dim"), std=std, name="kv")(x)
        return q, kv[..., 0, :, :], kv[..., 1, :, :]

    def _project_unequal(self, x: Array) -> tuple[Array, Array, Array]:
        """Heads of different sizes, padded with zeros to the largest: zeros change neither scores nor outputs."""
        config = self.config
        D, K = config.d_model, config.key_size
        qkv = Product(config, (D, 3, D), ("embed", None, "heads"), std=config.init_std, name="qkv")(x)
        heads, start = [], 0
        for size in config.head_dims:
            part = qkv[..., start : start + size]
            heads.append(jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, K - size)]))
            start += size
        padded = jnp.stack(heads, axis=-2)  # [B, T, 3, H, K]
        scale = (K / jnp.asarray(config.head_dims, jnp.float32)) ** 0.5  # scores divide by sqrt of the head's own size
        q = padded[:, :, 0] * scale[:, None].astype(padded.dtype)
        return q, padded[:, :, 1], padded[:, :, 2]

    def _variant(self, keys_B: Array | None) -> Variant:
        config = self.config
        mixing = {}
        if config.talking_heads:
            eye = nn.with_logical_partitioning(lambda key, shape, dtype: jnp.eye(shape[0], dtype=dtype), (None, None))
            shape = (config.num_heads, config.num_heads)
            mixing = {
                "mix_scores_HxH": self.param("mix_scores", eye, shape, config.param_dtype),
                "mix_weights_HxH": self.param("mix_weights", eye, shape, config.param_dtype),
            }
        return Variant(
            window=config.window if self.kind == "band" else None,
            softcap=config.attention_softcap,
            alibi=config.positions == "alibi",
            dropout=config.dropout,
            keys_B=fold_name(keys_B, "attention") if config.dropout and keys_B is not None else None,
            **mixing,
        )


class Block(nn.Module):
    """Pre-norm residual block: h = x + Attention(norm(x)); y = h + MLP(norm(h))."""

    config: ModelConfig
    kind: str

    @nn.compact
    def __call__(self, x_BxTxD, layer, positions, mask, cache, keys_B, taps: Taps | None = None):
        config = self.config
        if taps is not None:
            x_BxTxD = taps.enter(x_BxTxD)
        if keys_B is not None:
            keys_B = jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys_B)
        h, cache, found = Attention(config, self.kind, name="attention")(
            Norm(config, name="attention_norm")(x_BxTxD), layer, positions, mask, cache, keys_B, taps
        )
        found |= {"residual": x_BxTxD, "attention_out": h}
        x_BxTxD = x_BxTxD + self._drop(h, keys_B, "attention_out")
        h = MLP(config, name="mlp")(Norm(config, name="mlp_norm")(x_BxTxD))
        out = x_BxTxD + self._drop(h, keys_B, "mlp_out")
        return out, cache, {} if taps is None else taps.kept(found | {"mlp_out": h})

    def _drop(self, h: Array, keys_B: Array | None, name: str) -> Array:
        if not self.config.dropout or keys_B is None:
            return h
        return dropout(h, self.config.dropout, fold_name(keys_B, name))
