"""Heads of different sizes (the article's), few, many and talking ones, at one width."""

from gpt_jax.ablation import Ablation
from gpt_jax.ablation.presets import tiny_text


def get_config():
    return tiny_text(positions="alibi", qk_norm=False)  # heads of different sizes go with neither rope nor qk_norm


def get_ablation():
    return Ablation(
        question="Does it matter how a width of 96 is cut into heads, and whether heads have different sizes?",
        config=get_config(),
        arms={
            "4 x 24": {},
            "8 + 16 + 24 + 48 (article)": {"model.head_dims": (8, 16, 24, 48)},
            "1 x 96": {"model.num_heads": 1},
            "12 x 8": {"model.num_heads": 12},
            "4 x 24, talking (article)": {"model.talking_heads": True},
        },
        metrics=("valid/bits_per_byte",),
    )
