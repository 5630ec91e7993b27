"""The objective causal_lm reweighted by perplexity, on the embedded corpus."""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 200
    config.batch_size = 16
    config.context_length = 128
    config.model.update(num_layers=2, d_model=128, num_heads=4)
    config.objective = dict(
        name="causal_lm",
        coefs={"lm": 1.0},
        z_loss=1e-4,
        label_smoothing=0.0,
        reweight="perplexity",
        alpha=0.5,
        clip=(0.5, 2.0),
    )
    config.data.doc_mask = True
    return config
