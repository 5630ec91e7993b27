"""AG News: which of four sections a news item belongs to (Zhang et al. 2015; the official test set of 7,600)."""

from gpt_jax.tasks.base import Classify, Task, files
from gpt_jax.tasks.readers import make, read_table

DATA = "$GPT_JAX_DATA/classify/ag_news_"


def task(
    train: str = f"{DATA}train.jsonl.xz",
    valid: str = "",
    test: str = f"{DATA}test.jsonl.xz",
    template: str = "{text}",
    hold_out: float = 0.1,
) -> Task:
    """Files of {"text", "label"}; without one for `valid`, `hold_out` of the training items are."""

    def read(path):
        return make(read_table(path), lambda row: Classify(row.fill(template), row.text("label"), where=row.where))

    return Task(
        name="ag_news",
        kind="classify",
        labels=("World", "Sports", "Business", "Sci/Tech"),
        metrics=("accuracy", "macro_f1"),
        splits=files(read, hold_out, train=train, valid=valid, test=test),
    )
