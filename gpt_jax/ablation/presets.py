"""The small configs that ablations start from: about twenty seconds each on two idle cores, nothing downloaded."""

from __future__ import annotations

from typing import Any

import ml_collections

from gpt_jax.config import base


def tiny_text(steps: int = 240, **model: Any) -> ml_collections.ConfigDict:
    """A GPT of 0.3M parameters on the embedded corpus: rows of 128 tokens, 1,024 pieces, Muon.

    The whole validation split is read at the end, a part of it along the way, and nothing is sampled.
    """
    config = base()
    config.steps = steps
    config.batch_size = 16
    config.context_length = 128
    config.model.update(num_layers=2, d_model=96, num_heads=4)
    config.model.update(positions="rope", norm="rmsnorm", qk_norm=True, bias=False)
    config.model.update(**model)
    config.data.tokenizer.vocab_size = 1024
    config.optimizer.update(name="muon", learning_rate=0.02, weight_decay=0.05, warmup="5%", end_factor=0.05)
    config.eval.update(every_steps=max(1, steps // 6), max_batches=6, batch_size=32)
    config.checkpoint.every_steps = 0
    config.sample.prompts = ()
    return config


def tiny_task(objective: dict[str, Any], tasks: tuple[Any, ...], steps: int = 160) -> ml_collections.ConfigDict:
    """The same model on embedded tasks; `init.from` gives it other weights to start from."""
    config = tiny_text(steps)
    config.objective = objective
    config.data.tasks = tasks
    config.eval.update(every_steps=0, max_generated=1)
    return config
