"""Several objectives in one compiled update, on the embedded corpus: text, docstrings and kinds of objects."""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 200
    config.batch_size = 16
    config.context_length = 128
    config.model.update(num_layers=2, d_model=128, num_heads=4)
    config.objective = dict(
        name="mixture",
        tasks={
            "text": dict(name="causal_lm", rows=6),
            "docstrings": dict(name="supervised", rows=6, max_new=32, data={"tasks": ("python_docstrings",)}),
            "kinds": dict(name="classify", rows=4, coef=0.5, data={"tasks": ("python_kinds",)}),
        },
    )
    config.data.tokenizer.vocab_size = 2048
    config.eval.update(every_steps=100, max_generated=20)
    return config
