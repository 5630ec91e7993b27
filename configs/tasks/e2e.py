"""E2E NLG (a sentence about a restaurant from its attributes)."""

from gpt_jax.presets import fine_tune


def get_config():
    objective = dict(name="supervised", mask="prefix", max_new=80)
    return fine_tune(objective, ("e2e",), steps=200, batch_size=16, context_length=256)
