"""The article cuts the vocabulary to its k most frequent tokens: judged in bits per byte, which k cannot flatter."""

from gpt_jax.ablation import Ablation
from gpt_jax.ablation.presets import tiny_text


def get_config():
    config = tiny_text()
    config.data.tokenizer.vocab_size = 4096
    return config


def get_ablation():
    return Ablation(
        question="Of 4,096 pieces the k most frequent are kept, what else there is spelled in bytes. Which k is best?",
        config=get_config(),
        arms={
            "4,096 (all)": {},
            "2,048": {"data.tokenizer.keep": 2048},
            "1,024": {"data.tokenizer.keep": 1024},
            "512": {"data.tokenizer.keep": 512},
        },
        metrics=("valid/bits_per_byte", "valid/perplexity"),
        reading="Arms read equally many tokens, so a larger vocabulary reads more text and has more parameters. "
        "Perplexity is per token, so it falls with k whatever the model is worth: it is shown to show that.",
    )
