"""bAbI: questions on little stories, 20 tasks of 1,000 training and 1,000 test questions (Weston et al. 2015)."""

import itertools
from collections.abc import Iterable, Iterator

from gpt_jax.data.readers import local_path
from gpt_jax.errors import UserError
from gpt_jax.tasks.base import Malformed, Task, TextToText
from gpt_jax.tasks.readers import Row, make, read_babi

TASKS = range(1, 21)
# Stories from this question of the training file on are `valid`.
FIRST_VALID = 900


def task(
    number: int = 0, path: str = "$GPT_JAX_DATA/qa/babi_en.tar.xz", template: str = "{story}\n{question}\n"
) -> Task:
    """The archive of the English stories.

    Args:
      number: 1 to 20; 0 is all of them, taking turns, each a group of its own in the scores.
      template: of the source, from {story}, a statement a line, and {question}.
    """
    if number not in (0, *TASKS):
        raise UserError(f"task babi: number is {number!r}; allowed: 1 to 20, or 0 for all of them.")

    def build(row: Row, group: str) -> TextToText:
        shown = Row(row.where, {"story": "\n".join(row["story"]), "question": row["question"]})
        return TextToText(shown.fill(template), row["answer"], where=row.where, group=group)

    def read(n: int, split: str) -> Iterator[TextToText | Malformed]:
        archive = local_path(path)
        rows = read_babi(archive, f"qa{n}_", "test" if split == "test" else "train")
        if split != "test":
            rows = (row for row, in_valid in _with_valid(rows) if in_valid == (split == "valid"))
        return make(rows, lambda row: build(row, "" if number else f"qa{n}"))

    def examples(split: str) -> Iterator[TextToText | Malformed]:
        parts = [read(n, split) for n in ([number] if number else TASKS)]
        for turn in itertools.zip_longest(*parts):
            yield from filter(None, turn)

    return Task(
        name=f"babi_{number}" if number else "babi",
        kind="text_to_text",
        metrics=("accuracy",),
        splits={split: lambda split=split: examples(split) for split in ("train", "valid", "test")},
    )


def _with_valid(rows: Iterable[Row | Malformed]) -> Iterator[tuple[Row | Malformed, bool]]:
    """Yields (row, whether its story begins at or after question FIRST_VALID)."""
    story, in_valid = None, False
    for index, row in enumerate(rows):
        if isinstance(row, Row) and row["number"] != story:
            story, in_valid = row["number"], index >= FIRST_VALID
        yield row, in_valid
