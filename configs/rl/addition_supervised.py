"""Two-digit addition in GPT-3's format, supervised: where policy gradient (addition_rl) starts, stopped half way."""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 1500
    config.batch_size = 32
    config.context_length = 40
    config.model.update(num_layers=3, d_model=128, num_heads=4)
    config.model.update(norm="rmsnorm", ffn="relu2", qk_norm=True, bias=False)
    config.objective = dict(name="supervised", max_new=6)
    config.data.tasks = ("synthetic_arithmetic",)
    config.data.tokenizer.kind = "byte"
    config.optimizer.update(learning_rate=1e-3, warmup="100", weight_decay=0.1, schedule="constant")
    config.eval.update(every_steps=500, max_generated=200)
    config.checkpoint.every_steps = 500
    config.sample.prompts = ()
    return config
