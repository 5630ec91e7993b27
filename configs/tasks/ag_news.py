"""AG News (which of four sections is a story from?)."""

from gpt_jax.presets import fine_tune


def get_config():
    objective = dict(name="classify", coefs={"classify": 1.0, "lm": 0.5})
    return fine_tune(objective, ("ag_news",), steps=200, batch_size=32, context_length=128)
