"""The decoder stack: embeddings, a scanned pattern of blocks, a final norm and the output layer.

Linen is Flax's functional API (init and apply over explicit trees), stable and not deprecated; NNX is a mutable object
graph and still changing. Used purely: `model.init(key, tokens)`, `model.apply(params, tokens, ...) -> Output`.

Parameters of the blocks are stacked over repetitions of `config.pattern`, whatever the execution: `unroll` and
`remat` change neither the tree nor, beyond rounding, the numbers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array, lax

from gpt_jax.errors import UserError
from gpt_jax.model.attention import HIDDEN, Mask
from gpt_jax.model.cache import Cache
from gpt_jax.model.config import ModelConfig
from gpt_jax.model.decoding import blocks_of
from gpt_jax.model.derivatives import add_bias
from gpt_jax.model.layers import Block, Norm, Product
from gpt_jax.model.random import dropout, fold_name
from gpt_jax.model.taps import Taps
from gpt_jax.options import import_path


@struct.dataclass
class Output:
    """What `apply` returns.

    Attributes:
      hidden: [B, T, D], after the final norm.
      logits: [B, T, V] float32 over the vocabulary, padded rows cut off.
      cache: the extended cache, or None.
      aux: values that layers hand up by name (losses that are not sums over rows), {} in a dense stack.
      intermediates: what taps collected, layers first: [L, ...]; and "residual_out" [B, T, D], what enters the final
        norm. None without taps.
    """

    hidden: Array
    logits: Array
    cache: Cache | None = None
    aux: dict[str, Any] = struct.field(default_factory=dict)
    intermediates: dict[str, Array] | None = None


def block_class(config: ModelConfig) -> type[nn.Module]:
    """The class of a config's blocks: `Block`, or the user's, which is called in the same way."""
    return import_path(config.block) if config.block else Block


class _Repetition(nn.Module):
    """One repetition of the pattern; scanned over, with parameters stacked on the leading axis."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD, index, positions, mask, keys_B, taps):
        found = []
        for i, kind in enumerate(self.config.pattern):
            layer = index * len(self.config.pattern) + i
            block = block_class(self.config)(self.config, kind, name=f"block_{i}")
            own = None if taps is None else taps.of(i)
            x_BxTxD, _, kept = block(x_BxTxD, layer, positions, mask, None, keys_B, own)
            lacking = [] if own is None else [name for name in own.collect if name not in kept]
            if lacking:
                raise UserError(f"block {self.config.block!r} gives no {', '.join(lacking)} for a look inside (taps).")
            found.append(kept)
        return x_BxTxD, None if taps is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


_REMAT_POLICIES = {
    "full": lambda: jax.checkpoint_policies.nothing_saveable,
    "dots": lambda: jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": lambda: jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload_dots": lambda: jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


class Transformer(nn.Module):
    """A GPT. See ModelConfig for its variants.

    Example:
      model = Transformer(ModelConfig(vocab_size=65, max_positions=64, num_layers=2))
      params = model.init(jax.random.key(0), tokens)["params"]
      logits = model.apply({"params": params}, tokens).logits
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        if config.vocab_size < 1:
            raise UserError(f"model.vocab_size is {config.vocab_size}; a model needs at least one token.")
        if config.positions == "learned" and config.max_positions < 1:
            raise UserError(f"model.max_positions is {config.max_positions}; learned positions need at least one.")
        normal = nn.initializers.normal(config.init_std)
        D, E = config.d_model, config.embed_size
        shape = (config.padded_vocab, E)
        axes = ("vocab", "embed")
        self.embedding = self.param("embedding", nn.with_logical_partitioning(normal, axes), shape, config.param_dtype)
        if config.positions == "learned":
            self.position_embedding = self.param(
                "position_embedding",
                nn.with_logical_partitioning(nn.initializers.normal(config.init_std / 2), ("positions", "embed")),
                (config.max_positions, E),
                config.param_dtype,
            )
        if not config.tie_embeddings:
            self.head = self.param("head", nn.with_logical_partitioning(normal, axes), shape, config.param_dtype)
        if E != D:  # of these widths, activations keep their scale
            self.embedding_in = Product(config, (E, D), (None, "embed"), std=E**-0.5)
            self.embedding_out = Product(config, (D, E), ("embed", None), std=D**-0.5)
        repetition, repetitions = _Repetition, config.num_layers // len(config.pattern)
        if config.remat != "none":
            # Of layers written out the compiler would merge both passes again; in a loop it cannot.
            loop = 1 <= config.unroll < repetitions
            repetition = nn.remat(repetition, policy=_REMAT_POLICIES[config.remat](), prevent_cse=not loop)
        self.layers = nn.scan(
            repetition,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=repetitions,
            # Drawing weights in a loop is a small program, and gives the same ones.
            unroll=1 if self.is_initializing() else config.unroll or repetitions,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config)
        self.final_norm = Norm(config)

    def __call__(
        self,
        tokens: Array,
        *,
        mask: Mask | None = None,
        positions: Array | None = None,
        cache: Cache | None = None,
        keys: Array | None = None,
        taps: Taps | None = None,
    ) -> Output:
        """Runs the stack.

        Args:
          tokens: [B, T] integers.
          mask: what a token may see; None is causal. With a cache only its kind counts: 'causal' by the positions in
            the cache, or 'bidirectional' (a prefix, entered at once).
          positions: [B, T] or [T] positions; None counts from 0, or continues the cache. -1 marks padding (cache only).
          cache: keys and values of earlier tokens; T new ones are written after them.
          keys: [B] random keys, one per row, for dropout; None is deterministic.
          taps: what to collect of the inside, and what to put in its place (no cache then); None costs nothing.

        Returns:
          Output.

        Raises:
          UserError: more tokens than learned positions.
        """
        options = dict(mask=mask, positions=positions, cache=cache, keys=keys, taps=taps)
        hidden, cache, found = self._encode(tokens, **options)
        logits = self.unembed(hidden)[..., : self.config.vocab_size]
        return Output(hidden=hidden, logits=logits, cache=cache, intermediates=found)

    def encode(
        self, tokens, *, mask=None, positions=None, cache=None, keys=None, added=None
    ) -> tuple[Array, Cache | None]:
        """As `__call__`, without the output layer: hidden [B, T, D] and the cache.

        `added`, [B, 1, E] or [B, T, E], joins the token embeddings: of a segment, or of a label (CBERT).
        """
        options = dict(mask=mask, positions=positions, cache=cache, keys=keys)
        return self._encode(tokens, **options, taps=None, added=added)[:2]

    def lens(self, residual: Array) -> Array:
        """What a residual stream [..., D] would say if it were the last: final norm and output layer, [..., V]."""
        return self.unembed(self.final_norm(residual))[..., : self.config.vocab_size]

    def _encode(self, tokens, *, mask, positions, cache, keys, taps, added=None) -> tuple[Array, Cache | None, Any]:
        config = self.config
        B, T = tokens.shape
        if config.positions == "learned" and positions is None and T > config.max_positions:
            raise UserError(f"{T} tokens do not fit the model's {config.max_positions} learned positions.")
        contiguous = positions is None and cache is None
        if cache is not None:
            if positions is None:
                last = jnp.max(cache.positions_BxS, axis=1, keepdims=True)
                positions = last + 1 + jnp.arange(T)
            positions = jnp.broadcast_to(positions, (B, T))
            cache = cache.extend(positions)
        elif contiguous:
            positions = jnp.arange(T)
        x = jnp.take(self.embedding.astype(config.dtype), tokens, axis=0)
        if added is not None:
            x = x + added.astype(config.dtype)
        if config.positions == "learned":
            table = self.position_embedding.astype(config.dtype)
            x = add_bias(x, table[:T]) if contiguous else x + jnp.take(table, positions, axis=0, mode="clip")
        if config.embed_size != config.d_model:
            x = self.embedding_in(x)
        if config.dropout and keys is not None:
            x = dropout(x, config.dropout, fold_name(keys, "embedding"))
        x = nn.with_logical_constraint(x, ("batch", "sequence", "act_embed"))
        if cache is not None:
            x, cache = self._through_cache(x, positions, mask or Mask(), cache, keys)
            return self.final_norm(x), cache.advance(T), None
        period = len(config.pattern)
        index = jnp.arange(config.num_layers // period)
        stacked = None if taps is None else taps.stacked(period)
        x, found = self.layers(x, index, positions, mask or Mask(), keys, stacked)
        if taps is not None:
            found = {name: leaf.reshape(-1, *leaf.shape[2:]) for name, leaf in found.items()} | {"residual_out": x}
        return self.final_norm(x), None, found

    def _through_cache(
        self, x: Array, positions: Array, mask: Mask, cache: Cache, keys: Array | None
    ) -> tuple[Array, Cache]:
        """The blocks one by one, each on its own arrays: a loop over stacked ones would copy them at every step."""
        config = self.config
        for layer, params in enumerate(blocks_of(self.variables["params"]["layers"], config)):
            block = block_class(config)(config, config.pattern[layer % len(config.pattern)], parent=None)
            x, cache, _ = block.apply({"params": params}, x, layer, positions, mask, cache, keys)
        return x, cache

    def unembed(self, hidden: Array) -> Array:
        """The output layer: hidden [..., D] -> logits [..., padded vocabulary] float32, padded ones hidden."""
        config = self.config
        table = (self.embedding if config.tie_embeddings else self.head).astype(config.dtype)
        lead = hidden.shape[:-1]
        if config.embed_size != config.d_model:
            hidden = self.embedding_out(hidden)
        if config.flatten:
            hidden = hidden.reshape(-1, hidden.shape[-1])
        contract = (((hidden.ndim - 1,), (1,)), ((), ()))
        logits = lax.dot_general(hidden.astype(config.dtype), table, contract, preferred_element_type=jnp.float32)
        if config.logit_softcap:
            logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
        if config.padded_vocab != config.vocab_size:
            column = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
            logits = jnp.where(column < config.vocab_size, logits, HIDDEN)
        return logits.reshape((*lead, config.padded_vocab))
