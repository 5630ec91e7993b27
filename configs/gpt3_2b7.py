"""GPT-3 2.7B: 32 layers, width 2,560, context 2,048, 300 billion tokens (Brown et al. 2020, Table 2.1)."""

from gpt_jax.presets import gpt3


def get_config():
    return gpt3("gpt3_2b7")
