"""WNUT-17 (entities in social media), each word tagged with all of the sentence in sight."""

from gpt_jax.presets import fine_tune


def get_config():
    objective = dict(name="tag")
    return fine_tune(objective, ("wnut17",), steps=300, batch_size=32, context_length=96)
