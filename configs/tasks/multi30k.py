"""Multi30k (captions of pictures from German to English)."""

from gpt_jax.presets import fine_tune


def get_config():
    objective = dict(name="supervised", mask="prefix", max_new=48)
    return fine_tune(objective, ("multi30k",), steps=300, batch_size=16, context_length=256)
