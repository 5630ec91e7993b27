"""GPT-3 175B: 96 layers, width 12,288, context 2,048, 300 billion tokens (Brown et al. 2020, Table 2.1)."""

from gpt_jax.presets import gpt3


def get_config():
    config = gpt3("gpt3_175b")
    config.mesh.tensor = 8
    return config
