"""SciTLDR: a sentence that sums up a paper's abstract (Cachola et al. 2020; 1,992 / 619 / 618 papers)."""

from gpt_jax.tasks.base import Task, TextToText, files
from gpt_jax.tasks.readers import BadRow, Row, make, read_table

DATA = "$GPT_JAX_DATA/generate/scitldr_"


def task(
    train: str = f"{DATA}train.jsonl.xz",
    valid: str = f"{DATA}dev.jsonl.xz",
    test: str = f"{DATA}test.jsonl.xz",
    template: str = "{source}\nTL;DR:\n",
    sentences: int = 0,
) -> Task:
    """Files of {"source": [sentence, ...], "target": [summary, ...], "title"}; all summaries are references.

    Args:
      template: from {source}, the abstract in one line, and {title}.
      sentences: how many of the abstract are shown; 0 is all.
    """

    def build(row: Row) -> TextToText:
        for name in ("source", "target"):
            if not isinstance(row[name], list) or not row[name] or not all(isinstance(s, str) for s in row[name]):
                raise BadRow(f"column {name!r} is no list of sentences")
        shown = [" ".join(s.split()) for s in row["source"][: sentences or None]]
        references = tuple(" ".join(s.split()) for s in row["target"])
        source = Row(row.where, {**row.columns, "source": " ".join(shown)}).fill(template)
        return TextToText(source, references[0], references, where=row.where)

    return Task(
        name="scitldr",
        kind="text_to_text",
        metrics=("rouge1", "rouge2", "rougeL"),
        splits=files(lambda path: make(read_table(path), build), train=train, valid=valid, test=test),
    )
