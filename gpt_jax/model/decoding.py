"""Parameters as decoding wants them: what every step would do to them again is done once."""

from __future__ import annotations

import functools
from typing import Any

import jax

from gpt_jax.model.config import ModelConfig
from gpt_jax.model.transformer import unstack

_FACTORS = ("kernel", "embedding", "position_embedding", "head")  # used in the dtype of the products only


@functools.partial(jax.jit, static_argnums=0)
def decoding_params(config: ModelConfig, params: Any) -> Any:
    """Returns parameters for `Transformer.apply` with a cache: an array per layer, in the dtype of the products.

    A loop over tokens that slices stacked parameters copies all of them at every step. This copy lives beside the
    original while text is generated.
    """

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf.astype(config.dtype) if path[-1].key in _FACTORS else leaf

    params = dict(params) | {"layers": unstack(params["layers"], config)}
    return jax.tree_util.tree_map_with_path(cast, params)
