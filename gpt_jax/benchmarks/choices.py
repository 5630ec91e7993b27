"""Questions of your own in a .jsonl file: multiple choice, and cloze (a blank to fill, as in the Winograd schemas)."""

from gpt_jax.benchmarks.base import Benchmark, Item
from gpt_jax.benchmarks.files import read_rows
from gpt_jax.errors import UserError

BLANK = "____"


def choices(path: str = "") -> Benchmark:
    """Objects {"prompt", "choices": [text, ...], "answer": index}; a choice follows its prompt after a space."""

    def items() -> list[Item]:
        found = []
        for row in read_rows(_named(path, "choices"), prompt=str, choices=list, answer=int):
            options = _options(row, "choices")
            found.append(Item(row["prompt"].rstrip(), tuple(f" {o.strip()}" for o in options), row["answer"]))
        return found

    return Benchmark("choices", "choice", items)


def cloze(path: str = "") -> Benchmark:
    """Objects {"text" with a blank ____, "options": [text, ...], "answer": index}.

    With text after the blank an option is judged by that text alone, after the option and what precedes it ('partial
    evaluation', Trinh and Le 2018; GPT-3's Winogrande); at the end, by the option itself.
    """

    def items() -> list[Item]:
        found = []
        for row in read_rows(_named(path, "cloze"), text=str, options=list, answer=int):
            options = _options(row, "options")
            before, blank, after = row["text"].partition(BLANK)
            if not blank:
                raise UserError(f"{row['where']}: there is no blank {BLANK} in the text.")
            if after.strip(" .!?"):
                contexts = tuple(before + option for option in options)
                found.append(Item("", (after,) * len(options), row["answer"], contexts, document=row["text"]))
            else:
                continuations = tuple(f" {option.strip()}{after}" for option in options)
                found.append(Item(before.rstrip(), continuations, row["answer"], document=row["text"]))
        return found

    return Benchmark("cloze", "choice", items, normalise="sum")


def _named(path: str, name: str) -> str:
    if not path:
        raise UserError(f"benchmark {name} needs a file: {name}:FILE.jsonl.")
    return path


def _options(row: dict, name: str) -> list[str]:
    options = row[name]
    if len(options) < 2 or not all(isinstance(option, str) and option.strip() for option in options):
        raise UserError(f"{row['where']}: {name!r} is no list of at least two texts.")
    if not 0 <= row["answer"] < len(options):
        raise UserError(f"{row['where']}: answer {row['answer']} is not one of the options 0 to {len(options) - 1}.")
    return options
