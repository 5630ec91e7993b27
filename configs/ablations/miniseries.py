"""A series of models by one dial, depth: is each worth its compute?"""

from gpt_jax.ablation import Ablation
from gpt_jax.ablation.presets import tiny_text
from gpt_jax.scaling import dial


def get_config():
    return tiny_text()


def get_ablation():
    arms = {f"depth {depth}": dial(depth, tokens_per_parameter=2.0) for depth in (2, 3, 4)}
    arms = {name: {**own, "eval.every_steps": max(1, own["steps"] // 6)} for name, own in arms.items()}
    return Ablation(
        question="How does the loss fall with compute along a series of models that one number describes?",
        config=get_config(),
        arms=arms,
        seeds=3,
        metrics=("valid/bits_per_byte",),
        reading="Depth sets width, heads, learning rate, batch and tokens (gpt_jax/scaling.py): 2 a parameter.",
    )
