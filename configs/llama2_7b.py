"""Llama 2 7B's size and recipe: 32 layers, width 4,096, context 4,096 (Touvron et al. 2023)."""

from gpt_jax.presets import llama2


def get_config():
    return llama2("llama2_7b")
