"""Llama 2 70B's size and recipe: 80 layers, width 8,192, context 4,096 (Touvron et al. 2023)."""

from gpt_jax.presets import llama2


def get_config():
    config = llama2("llama2_70b")
    config.mesh.tensor = 8
    return config
