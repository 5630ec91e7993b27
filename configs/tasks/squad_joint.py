"""Reading comprehension and generation on the same passages: the span, the question and the text, one update."""

from gpt_jax.presets import fine_tune


def get_config():
    question = {"tasks": ({"name": "squad_generate", "generate": "question"},)}
    objective = dict(
        name="mixture",
        tasks={
            "span": dict(name="span_qa", rows=16, doc_stride=96, data={"tasks": ("squad",)}),
            "question": dict(name="supervised", rows=8, mask="prefix", max_new=32, coef=0.5, data=question),
            "text": dict(name="supervised", rows=4, loss_on="all", max_new=32, coef=0.25, data=question),
        },
    )
    return fine_tune(objective, (), steps=300, batch_size=28, context_length=256)
