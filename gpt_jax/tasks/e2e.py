"""E2E NLG: a sentence about a restaurant from its attributes (Novikova et al. 2017; 42,061 / 4,672 / 4,693 pairs)."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator

from gpt_jax.tasks.base import Malformed, Task, TextToText, files
from gpt_jax.tasks.readers import Row, make, read_table

DATA = "$GPT_JAX_DATA/generate/e2e_"
# The training file comes as "£ 20 - 25 ." and "family - friendly"; the others have "£20-25." and "family-friendly".
_JOINED = [
    (re.compile(r"£ (?=\d)"), "£"),
    (re.compile(r"(?<=\w) - (?=\w)"), "-"),
    (re.compile(r" (?=[.,;:!?])"), ""),
    (re.compile(r" (?=(?:'s|'re|'ve|'ll|'d|'m|n't)\b)"), ""),
]


def task(
    train: str = f"{DATA}train.jsonl.xz",
    valid: str = f"{DATA}dev.jsonl.xz",
    test: str = f"{DATA}test.jsonl.xz",
    template: str = "{mr}\n",
) -> Task:
    """Files of {"mr", "ref"}, that of `train` in tokens, which are joined.

    In `valid` and `test`, which stay as written, all texts of one meaning representation are one example's references.
    """

    def written(path: pathlib.Path, join: Callable[[str], str] = str) -> Iterator[TextToText | Malformed]:
        def build(row: Row) -> TextToText:
            row = Row(row.where, {name: join(row.text(name)) for name in ("mr", "ref")})
            return TextToText(row.fill(template), row["ref"], where=row.where)

        return make(read_table(path), build)

    def tokenized(path: pathlib.Path) -> Iterator[TextToText | Malformed]:
        return written(path, detokenize)

    def grouped(path: pathlib.Path) -> Iterator[TextToText | Malformed]:
        return group_by_source(written(path))

    return Task(
        name="e2e",
        kind="text_to_text",
        metrics=("bleu", "rougeL", "chrf"),
        splits={**files(tokenized, train=train), **files(grouped, valid=valid, test=test)},
    )


def detokenize(text: str) -> str:
    """Joins punctuation, hyphens, pounds and contractions to the words that they belong to."""
    for pattern, joined in _JOINED:
        text = pattern.sub(joined, text)
    return text


def group_by_source(items: Iterator[TextToText | Malformed]) -> Iterator[TextToText | Malformed]:
    """Yields one example per source, in the order of their first: its target, and every target as a reference."""
    groups: dict[str, list[TextToText]] = {}
    for item in items:
        if isinstance(item, Malformed):
            yield item
        elif problem := item.problem(()):
            yield Malformed(item.where, problem)
        else:
            groups.setdefault(item.source, []).append(item)
    for group in groups.values():
        references = dict.fromkeys(reference for item in group for reference in item.references)
        yield dataclasses.replace(group[0], references=tuple(references))
