"""A small GPT that learns from a larger one, a run of configs/quickstart.py, which `init.from` names."""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 200
    config.batch_size = 16
    config.context_length = 256
    config.model.update(num_layers=2, d_model=96, num_heads=4)
    config.model.update(positions="rope", norm="rmsnorm", ffn="relu2", qk_norm=True, bias=False)
    config.objective = dict(name="distillation", teacher={"num_layers": 4, "d_model": 192}, temperature=2.0)
    config.init.update(model=False, rename=(("^model/", "teacher/"),))
    config.data.tokenizer.vocab_size = 2048
    config.optimizer.update(name="muon", learning_rate=0.02, weight_decay=0.05, end_factor=0.05)
    config.eval.every_steps = 100
    return config
