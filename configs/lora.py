"""Classification as in `classify`, with LoRA: the base stays as it is (init.from names a run to adapt)."""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 200
    config.batch_size = 16
    config.context_length = 128
    config.model.update(num_layers=2, d_model=128, num_heads=4, lora_rank=8)
    config.objective = dict(name="classify")
    config.data.tasks = ("python_kinds",)
    config.data.tokenizer.vocab_size = 2048
    config.optimizer.learning_rate = 3e-3
    config.eval.every_steps = 100
    config.sample.prompts = ()  # nothing here learns to write
    return config
