"""Tagging on the embedded corpus: the role of each identifier in a piece of Python source."""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 200
    config.batch_size = 16
    config.context_length = 128
    config.model.update(num_layers=2, d_model=128, num_heads=4)
    config.objective = dict(name="tag")
    config.data.tasks = ("python_identifiers",)
    config.data.tokenizer.vocab_size = 2048
    config.eval.every_steps = 100
    config.sample.prompts = ()  # nothing here learns to write
    return config
