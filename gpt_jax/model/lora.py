"""LoRA (Hu et al. 2021): what is trained, and merging it into the weights it adapts.

`model.lora_rank` gives the products that `model.lora_targets` names (alpha / rank) x A @ B beside x @ W; see `Product`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from gpt_jax.model.config import ModelConfig

# Names of the parameters of the root "model" that stay as they are: all but A and B. Heads are roots of their own.
LORA_BASE = r"model/(?!.*/lora_[ab]$).*"


def merge_lora(params: Any, config: ModelConfig) -> tuple[Any, ModelConfig]:
    """Returns a model's parameters with W + (alpha / rank) A B in the place of W, and its config without LoRA.

    Args:
      params: of the model's own root, unboxed, NumPy or jax.
    """
    if not config.lora_rank:
        return params, config
    return _merged(params, config.lora_scale), dataclasses.replace(config, lora_rank=0)


def _merged(node: Any, scale: float) -> Any:
    if not isinstance(node, dict):
        return node
    out = {name: _merged(child, scale) for name, child in node.items()}
    if "lora_a" in out:
        a, b, kernel = (jnp.asarray(out.pop(name)) for name in ("lora_a", "lora_b", "kernel"))
        layers, rank = b.shape[:2]
        low = a.reshape(layers, -1, rank).astype(jnp.float32) @ b.reshape(layers, rank, -1).astype(jnp.float32)
        out["kernel"] = (kernel + scale * low.reshape(kernel.shape)).astype(kernel.dtype)
    return out
