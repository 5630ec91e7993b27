"""Multiple choice on the embedded corpus: which of four docstrings belongs to a piece of Python source?"""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 200
    config.batch_size = 8
    config.context_length = 128
    config.model.update(num_layers=2, d_model=128, num_heads=4)
    config.objective = dict(name="multiple_choice")
    config.data.tasks = ("python_choices",)
    config.data.tokenizer.vocab_size = 2048
    config.eval.every_steps = 100
    config.sample.prompts = ()  # nothing here learns to write
    return config
