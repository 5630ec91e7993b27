"""A small GPT on the documentation of the Python at hand: minutes on two cores, nothing downloaded."""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 1000
    config.batch_size = 16
    config.context_length = 256
    config.model.update(num_layers=4, d_model=192, num_heads=4)
    config.optimizer.update(learning_rate=3e-3, weight_decay=0.1)
    config.eval.every_steps = 200
    config.sample.prompts = ("The ", "Return a ")
    return config
