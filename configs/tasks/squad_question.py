"""SQuAD backwards: the question that a span of a passage answers, generated."""

from gpt_jax.presets import fine_tune


def get_config():
    objective = dict(name="supervised", mask="prefix", max_new=32)
    tasks = ({"name": "squad_generate", "generate": "question"},)
    return fine_tune(objective, tasks, steps=300, batch_size=8, context_length=256)
