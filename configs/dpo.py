"""Preferences on the embedded corpus: a docstring of Python's library against the same one spoilt.

`init.from` names the run to start from, which is also the reference; without it both start from scratch."""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 200
    config.batch_size = 8
    config.context_length = 192
    config.model.update(num_layers=2, d_model=128, num_heads=4)
    config.objective = dict(name="dpo", beta=0.1)
    config.data.tasks = ("python_preferences",)
    config.data.tokenizer.vocab_size = 2048
    config.optimizer.learning_rate = 3e-4
    config.eval.every_steps = 100
    return config
