"""GPT-3 XL: 24 layers, width 2,048, context 2,048, 300 billion tokens (Brown et al. 2020, Table 2.1)."""

from gpt_jax.presets import gpt3


def get_config():
    return gpt3("gpt3_1b3")
