"""The article's feed-forward layer, tanh(W2 relu(W1 x)), beside GPT-2's: what does the outer tanh cost?"""

from gpt_jax.ablation import Ablation
from gpt_jax.ablation.presets import tiny_text


def get_config():
    return tiny_text()


def get_ablation():
    return Ablation(
        question="The article's feed-forward layer is tanh(W2 relu(W1 x)). Does it predict as well as W2 gelu(W1 x)?",
        config=get_config(),
        arms={
            "gelu": {"model.ffn": "gelu_tanh"},
            "relu_tanh (article)": {"model.ffn": "relu_tanh"},
            "relu2": {"model.ffn": "relu2"},
        },
        metrics=("valid/bits_per_byte", "valid/loss"),
    )
