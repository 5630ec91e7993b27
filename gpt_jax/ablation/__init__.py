"""Ablations: a grid of overrides of one config times paired seeds, run, compared and reported."""

from gpt_jax.ablation.grid import Ablation, chain, over, product, zipped

__all__ = ["Ablation", "chain", "over", "product", "zipped"]
