"""The classifier of the augmentation experiment on AG News: scripts/augment_experiment.py --config=augment/ag_news_low.

10 originals per class, 5 splits; every arm takes the same steps of the same size."""

from gpt_jax.presets import fine_tune


def get_config():
    config = fine_tune(dict(name="classify"), ("ag_news",), steps=100, batch_size=16, context_length=64)
    config.optimizer.learning_rate = 0.005
    return config
