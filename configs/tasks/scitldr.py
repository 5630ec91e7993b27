"""SciTLDR (a sentence that sums up a paper's abstract)."""

from gpt_jax.presets import fine_tune


def get_config():
    objective = dict(name="supervised", mask="prefix", max_new=60)
    return fine_tune(objective, ({"name": "scitldr", "sentences": 6},), steps=200, batch_size=8, context_length=384)
