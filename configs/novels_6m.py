"""A GPT of 5.8M parameters on 78 English novels: under three hours on two cores; configs/tasks/ starts from it."""

from gpt_jax.presets import novels_6m


def get_config():
    return novels_6m()
