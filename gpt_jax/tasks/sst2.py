"""SST-2: is a sentence of a film review positive? (Socher et al. 2013; 6,920 / 872 / 1,821 sentences.)"""

from gpt_jax.tasks.base import Classify, Task, files
from gpt_jax.tasks.readers import BadRow, Row, make, read_table

LABELS = ("negative", "positive")
DATA = "$GPT_JAX_DATA/classify/sst2_"


def task(
    train: str = f"{DATA}train.tsv.xz",
    valid: str = f"{DATA}dev.tsv.xz",
    test: str = f"{DATA}test.tsv.xz",
    template: str = "{text}",
) -> Task:
    """Files of sentence TAB 0 or 1; the template may frame the sentence ('Review: {text}')."""

    def build(row: Row) -> Classify:
        if row["label"] not in ("0", "1"):
            raise BadRow(f"label {row['label']!r} is unknown; allowed: 0, 1")
        return Classify(row.fill(template), LABELS[int(row["label"])], where=row.where)

    def read(path):
        return make(read_table(path, columns=("text", "label")), build)

    return Task(
        name="sst2",
        kind="classify",
        labels=LABELS,
        metrics=("accuracy", "macro_f1", "mcc"),
        splits=files(read, train=train, valid=valid, test=test),
    )
