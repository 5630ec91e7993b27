"""Four tasks of four kinds at once: SST-2, WNUT-17, SQuAD and E2E, a sub-batch each, in one compiled update."""

from gpt_jax.presets import fine_tune


def get_config():
    objective = dict(
        name="mixture",
        tasks={
            "sst2": dict(name="classify", rows=16, data={"tasks": ("sst2",)}),
            "wnut17": dict(name="tag", rows=8, data={"tasks": ("wnut17",)}),
            "squad": dict(name="span_qa", rows=8, doc_stride=96, data={"tasks": ("squad",)}),
            "e2e": dict(name="supervised", rows=8, mask="prefix", max_new=80, data={"tasks": ("e2e",)}),
        },
    )
    return fine_tune(objective, (), steps=300, batch_size=40, context_length=256)
