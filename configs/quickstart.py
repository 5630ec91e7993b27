"""A small GPT on the documentation of the Python at hand: under three minutes on two cores, nothing downloaded."""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 130
    config.batch_size = 16
    config.context_length = 256
    config.model.update(num_layers=4, d_model=192, num_heads=4)
    config.model.update(positions="rope", norm="rmsnorm", ffn="relu2", qk_norm=True, bias=False)
    config.data.tokenizer.vocab_size = 2048
    config.optimizer.update(name="muon", learning_rate=0.02, weight_decay=0.05, end_factor=0.05)
    config.eval.every_steps = 65
    config.checkpoint.every_steps = 65
    config.sample.prompts = ("The ", "Return a ")
    return config
