"""Dense, banded and alternating attention (GPT-3), at rows of 256 tokens and a band of 16."""

from gpt_jax.ablation import Ablation
from gpt_jax.ablation.presets import tiny_text


def get_config():
    config = tiny_text()
    config.batch_size, config.context_length = 8, 256
    config.eval.batch_size = 16
    config.model.window = 16
    return config


def get_ablation():
    return Ablation(
        question="GPT-3 alternates dense and banded layers. What is lost to dense ones, and does the order matter?",
        config=get_config(),
        arms={
            "dense": {"model.pattern": ("dense",)},
            "band": {"model.pattern": ("band",)},
            "dense, band": {"model.pattern": ("dense", "band")},
            "band, dense": {"model.pattern": ("band", "dense")},
        },
        metrics=("valid/bits_per_byte",),
    )
