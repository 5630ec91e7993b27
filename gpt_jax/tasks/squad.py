"""SQuAD v1.1: the span of a passage that answers a question (Rajpurkar et al. 2016)."""

from collections.abc import Iterator

from gpt_jax.data.splits import held_out
from gpt_jax.tasks.base import Malformed, SpanQA, Task, files
from gpt_jax.tasks.readers import read_squad

TRAIN = "$GPT_JAX_DATA/qa/squad_v1.1_train_subset.json.xz"
TEST = "$GPT_JAX_DATA/qa/squad_v1.1_dev.json.xz"


def task(train: str = TRAIN, valid: str = "", test: str = TEST, valid_fraction: float = 0.05) -> Task:
    """The official dev set, whose answers are public, is `test`: it must choose nothing.

    Without a file for `valid`, about `valid_fraction` of the training passages are held out, with all their questions.
    """
    return Task(
        name="squad",
        kind="span_qa",
        metrics=("exact_match", "f1"),
        splits=squad_splits(train, valid, test, valid_fraction),
    )


def squad_splits(train: str, valid: str, test: str, valid_fraction: float) -> dict:
    """The splits of SQuAD files, as `task` says; questions on one passage are all in the same."""

    def part(of_valid: bool):
        def read(path) -> Iterator[SpanQA | Malformed]:
            for item in read_squad(path):
                if isinstance(item, Malformed) or held_out(item.context, valid_fraction) == of_valid:
                    yield item

        return read

    if valid:
        return files(read_squad, train=train, valid=valid, test=test)
    return {**files(part(False), train=train), **files(part(True), valid=train), **files(read_squad, test=test)}
