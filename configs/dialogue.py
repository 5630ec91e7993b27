"""Dialogue on the embedded corpus: questions on a piece of Python source, the loss on the answers."""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 200
    config.batch_size = 8
    config.context_length = 256
    config.model.update(num_layers=2, d_model=128, num_heads=4)
    config.objective = dict(name="dialogue", max_new=32)
    config.data.tasks = ("python_dialogue",)
    config.data.tokenizer.vocab_size = 2048
    config.eval.update(every_steps=100, max_generated=20)
    return config
