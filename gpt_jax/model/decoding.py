"""Parameters as decoding wants them: what every step would do to them again is done once."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
from flax import struct
from jax import Array, lax

from gpt_jax.model.config import ModelConfig

FEW = 64  # rows of a product
_FACTORS = ("kernel", "embedding", "position_embedding", "head")  # used in the dtype of the products only


@struct.dataclass
class Transposed:
    """A kernel [in, *out] kept as [out, in]: with few rows a product reads it in order instead of rearranging it."""

    matrix: Array
    shape: tuple[int, ...] = struct.field(pytree_node=False)

    def kernel(self) -> Array:
        return self.matrix.T.reshape(self.shape)

    def times(self, x: Array) -> Array:
        """x [..., in] @ kernel, [..., *out].

        Of few rows the matrix is the first factor: it is read up to 1.8 times as fast. The barrier keeps the compiler
        from turning the product round again.
        """
        rows, one = x.reshape(-1, x.shape[-1]), (((1,), (1,)), ((), ()))
        if len(rows) <= FEW:
            y = lax.optimization_barrier(lax.dot_general(self.matrix, rows, one)).T
        else:
            y = lax.dot_general(rows, self.matrix, one)
        inputs, out = self.matrix.shape[1], self.shape
        while inputs > 1:
            inputs, out = inputs // out[0], out[1:]
        return y.reshape(*x.shape[:-1], *out)


def unstack(layers: Any, config: ModelConfig) -> tuple[Any, ...]:
    """The parameters of each block, in order, of the stacked `params["layers"]`."""
    repetitions = range(config.num_layers // len(config.pattern))
    blocks = [layers[f"block_{i}"] for i in range(len(config.pattern))]
    return tuple(jax.tree.map(lambda leaf, r=r: leaf[r], block) for r in repetitions for block in blocks)


def decoding_params(config: ModelConfig, params: Any, rows: int) -> Any:
    """Returns parameters for `Transformer.apply` with a cache: an array per layer, in the dtype of the products.

    A loop over tokens that slices stacked parameters copies all of them at every step. This copy lives beside the
    original while text is generated.

    Args:
      rows: of a step. On a CPU kernels are kept as `Transposed`, which suits two rows or more, and one row not at all.
    """
    return _prepared(config, params, jax.default_backend() == "cpu" and rows > 1)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _prepared(config: ModelConfig, params: Any, transpose: bool) -> Any:

    def prepare(path: Any, leaf: Array) -> Any:
        name, parent = path[-1].key, path[-2].key if len(path) > 1 else ""
        leaf = leaf.astype(config.dtype) if name in _FACTORS else leaf
        if name != "kernel" or path[0].key != "layers" or not transpose:
            return leaf
        inputs = math.prod(leaf.shape[:2]) if parent == "out" and leaf.ndim == 3 else leaf.shape[0]
        return Transposed(leaf.reshape(inputs, -1).T, leaf.shape)

    params = dict(params) | {"layers": unstack(params["layers"], config)}
    return jax.tree_util.tree_map_with_path(prepare, params)


def blocks_of(layers: Any, config: ModelConfig) -> tuple[Any, ...]:
    """The parameters of each block, of stacked layers or of those that `decoding_params` has prepared.

    A block of the user's own gets arrays: it may have layers that know nothing of `Transposed`.
    """
    if not isinstance(layers, tuple):
        return unstack(layers, config)
    if not config.block:
        return layers
    return jax.tree.map(
        lambda leaf: leaf.kernel() if isinstance(leaf, Transposed) else leaf,
        layers,
        is_leaf=lambda leaf: isinstance(leaf, Transposed),
    )
