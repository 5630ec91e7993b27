"""SQuAD v1.1: the span of a passage that answers a question (Rajpurkar et al. 2016)."""

from gpt_jax.tasks.base import Task, files
from gpt_jax.tasks.readers import read_squad

TRAIN = "$GPT_JAX_DATA/qa/squad_v1.1_train_subset.json.xz"
TEST = "$GPT_JAX_DATA/qa/squad_v1.1_dev.json.xz"


def task(train: str = TRAIN, valid: str = "", test: str = TEST, hold_out: float = 0.05) -> Task:
    """The official dev set, whose answers are public, is `test`: it must choose nothing.

    Without a file for `valid`, about `hold_out` of the training passages are, with all their questions.
    """
    return Task(
        name="squad",
        kind="span_qa",
        metrics=("exact_match", "f1"),
        splits=files(read_squad, hold_out, train=train, valid=valid, test=test),
    )
