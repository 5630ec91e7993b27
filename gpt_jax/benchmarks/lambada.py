"""LAMBADA: the last word of a passage, which only its whole context gives away (Paperno et al. 2016)."""

from gpt_jax.benchmarks.base import Benchmark, Item
from gpt_jax.benchmarks.files import DATA, read_rows
from gpt_jax.errors import UserError

PATH = f"{DATA}/lambada_test.jsonl.xz"


def lambada(path: str = PATH) -> Benchmark:
    """The passage as it is; the last word, all its tokens, must be what greedy decoding gives."""
    return Benchmark("lambada", "greedy", lambda: _items(path, "{context}"))


def lambada_cloze(path: str = PATH) -> Benchmark:
    """GPT-3's fill-in-the-blank form for one and few shots: 'Alice went to visit her friend ____. -> Bob'."""
    return Benchmark("lambada_cloze", "greedy", lambda: _items(path, "{context} ____. ->"), separator="\n")


def _items(path: str, frame: str) -> list[Item]:
    items = []
    for row in read_rows(path, text=str):
        context, _, word = row["text"].rpartition(" ")
        if not context or not word:
            raise UserError(f"{row['where']}: a passage of at least two words is needed.")
        items.append(Item(frame.replace("{context}", context), (f" {word}",), document=row["text"]))
    return items
