"""bAbI (questions on little stories), all twenty tasks in one run."""

from gpt_jax.presets import fine_tune


def get_config():
    objective = dict(name="supervised", mask="prefix", max_new=8)
    return fine_tune(objective, ("babi",), steps=400, batch_size=16, context_length=256)
