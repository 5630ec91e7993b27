"""WNUT-17: emerging entities in noisy text (Derczynski et al. 2017; 3,394 / 1,009 / 1,287 sentences)."""

from gpt_jax.tasks.base import Tagged, Task, files
from gpt_jax.tasks.readers import make, read_conll

DATA = "$GPT_JAX_DATA/tag/wnut17_"
TYPES = ("corporation", "creative-work", "group", "location", "person", "product")


def task(
    train: str = f"{DATA}train.conll.xz", valid: str = f"{DATA}dev.conll.xz", test: str = f"{DATA}test.conll.xz"
) -> Task:
    """Files of word TAB tag, in BIO tags."""

    def read(path):
        return make(read_conll(path), lambda row: Tagged(row["words"], row["tags"], where=row.where))

    return Task(
        name="wnut17",
        kind="tag",
        labels=("O", *(f"{prefix}-{name}" for name in TYPES for prefix in "BI")),
        metrics=("entity_f1", "entity_precision", "entity_recall"),
        splits=files(read, train=train, valid=valid, test=test),
    )
