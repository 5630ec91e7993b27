"""The objective denoising: UL2's mixture of span corruption and prefix LM on the embedded corpus, about a minute."""

from gpt_jax.config import base
from gpt_jax.objectives.denoising import special_names


def get_config():
    config = base()
    config.steps = 130
    config.batch_size = 16
    config.context_length = 128
    config.model.update(num_layers=2, d_model=128, num_heads=4)
    config.objective = dict(
        name="denoising",
        recipe="ul2",
        denoisers=(),
        mode_tokens="auto",
        sentinels=16,
        mask="prefix",
    )
    config.data.tokenizer.specials = special_names(sentinels=16, modes=True)
    config.sample.prompts = ()  # text alone is no row: it has neither mode token nor sentinels
    return config
