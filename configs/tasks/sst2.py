"""SST-2 (is a film review positive?), all of its training sentences."""

from gpt_jax.presets import fine_tune


def get_config():
    objective = dict(name="classify", coefs={"classify": 1.0, "lm": 0.5})
    return fine_tune(objective, ("sst2",), steps=300, batch_size=32, context_length=64)
