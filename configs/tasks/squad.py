"""SQuAD v1.1 (the span of a passage that answers a question), windows with a stride."""

from gpt_jax.presets import fine_tune


def get_config():
    objective = dict(name="span_qa", doc_stride=96)
    return fine_tune(objective, ("squad",), steps=300, batch_size=16, context_length=256)
