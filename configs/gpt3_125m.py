"""GPT-3 Small: 12 layers, width 768, context 2,048, 300 billion tokens (Brown et al. 2020, Table 2.1)."""

from gpt_jax.presets import gpt3


def get_config():
    return gpt3("gpt3_125m")
