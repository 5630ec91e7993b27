"""HellaSwag: which of four endings goes on with a scene (Zellers et al. 2019)."""

import re

from gpt_jax.benchmarks.base import Benchmark, Item
from gpt_jax.benchmarks.files import DATA, read_rows
from gpt_jax.errors import UserError


def hellaswag(path: str = f"{DATA}/hellaswag_val_sample.jsonl.xz") -> Benchmark:
    """Objects {"activity_label", "ctx", "endings", "label"}; the activity, if there is one, precedes the context."""

    def items() -> list[Item]:
        found = []
        for row in read_rows(path, ctx=str, endings=list, label=(int, str)):
            label = int(row["label"]) if str(row["label"]).isdecimal() else -1
            if not 0 <= label < len(row["endings"]) or not all(isinstance(e, str) for e in row["endings"]):
                raise UserError(f"{row['where']}: label {row['label']!r} is no index of its endings.")
            activity = row.get("activity_label")
            context = clean(f"{activity}: {row['ctx']}" if activity else row["ctx"])
            found.append(Item(context, tuple(f" {clean(e)}" for e in row["endings"]), label))
        return found

    return Benchmark("hellaswag", "choice", items)


def clean(text: str) -> str:
    """Without WikiHow's markup ('[title]', '[step]')."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
