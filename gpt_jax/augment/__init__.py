"""Generative augmentation: synthetic training examples for a classification task, filtered and reported.

Every generator is `augment(train, rng) -> [(label, text, score, parent)]`.
"""

from gpt_jax.augment.base import Synthetic, augment_task, normalise, select
from gpt_jax.augment.controls import EDA, Copy

__all__ = ["EDA", "Copy", "Synthetic", "augment_task", "normalise", "select"]
