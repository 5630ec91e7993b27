"""Multi30k: captions of pictures in German and English (Elliott et al. 2016; 29,000 / 1,014 / 1,000, test 2016)."""

from gpt_jax.errors import choose
from gpt_jax.tasks.base import Task, TextToText, files
from gpt_jax.tasks.readers import Row, make, read_table

DATA = "$GPT_JAX_DATA/generate/multi30k_de_en_"


def task(
    source: str = "de",
    target: str = "en",
    train: str = f"{DATA}train.jsonl.xz",
    valid: str = f"{DATA}dev.jsonl.xz",
    test: str = f"{DATA}test.jsonl.xz",
    template: str = "{source}\n",
) -> Task:
    """Files of {"de", "en"}; `source` and `target` choose the direction."""
    for what, language in (("source", source), ("target", target)):
        choose(f"task multi30k: {what}", language, ("de", "en"))

    def build(row: Row) -> TextToText:
        pair = Row(row.where, {"source": row.text(source).strip(), "target": row.text(target).strip()})
        return TextToText(pair.fill(template), pair["target"], where=row.where)

    return Task(
        name=f"multi30k_{source}_{target}",
        kind="text_to_text",
        metrics=("bleu", "chrf"),
        splits=files(lambda path: make(read_table(path), build), train=train, valid=valid, test=test),
    )
