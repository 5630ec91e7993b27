"""Span question answering on the embedded corpus: the default of a parameter, as a span of a function's source."""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 120
    config.batch_size = 16
    config.context_length = 192
    config.model.update(num_layers=2, d_model=128, num_heads=4)
    config.objective = dict(name="span_qa", doc_stride=64)
    config.data.tasks = ("python_defaults",)
    config.data.tokenizer.vocab_size = 2048
    config.eval.every_steps = 60
    config.sample.prompts = ()  # nothing here learns to write
    return config
