"""The classifier of the augmentation experiment on SST-2: scripts/augment_experiment.py --config=augment/sst2_low.

10 originals per class, 15 splits (Kumar et al. 2020); every arm takes the same steps of the same size."""

from gpt_jax.presets import fine_tune


def get_config():
    config = fine_tune(dict(name="classify"), ("sst2",), steps=60, batch_size=16, context_length=64)
    config.optimizer.learning_rate = 0.005
    return config
