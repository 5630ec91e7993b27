"""The small config that ablations start from: half a minute on two cores, nothing downloaded."""

from __future__ import annotations

import ml_collections

from gpt_jax.config import base


def tiny_text(steps: int = 240, **model: object) -> ml_collections.ConfigDict:
    """A GPT of 0.3M parameters on the embedded corpus: rows of 128 tokens, 1,024 pieces, AdamW.

    The whole validation split is read at the end, a part of it along the way, and nothing is sampled.
    """
    config = base()
    config.steps = steps
    config.batch_size = 16
    config.context_length = 128
    config.model.update(num_layers=2, d_model=96, num_heads=4)
    config.model.update(**model)
    config.data.tokenizer.vocab_size = 1024
    config.optimizer.update(learning_rate=4e-3, warmup="10%", weight_decay=0.1, end_factor=0.05)
    config.eval.update(every_steps=max(1, steps // 6), max_batches=6, batch_size=32)
    config.checkpoint.every_steps = 0
    config.sample.prompts = ()
    return config
