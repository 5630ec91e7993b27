"""A talk about a piece of Python's library: what is it called, and what does it do?"""

from gpt_jax.tasks.base import Dialogue, Task
from gpt_jax.tasks.python_library import Definition, library_splits


def task(size: int = 3000, longest_code: int = 300, longest_docstring: int = 100) -> Task:
    """Embedded: nothing is downloaded. Lengths are in characters; the docstring is the first paragraph of it."""

    def build(definition: Definition) -> Dialogue | None:
        docstring = " ".join(definition.doc.partition("\n\n")[0].split())
        if definition.kind not in ("function", "method") or len(definition.code) > longest_code:
            return None
        if len(docstring) > longest_docstring or len(docstring.split()) < 3:
            return None
        turns = (
            ("user", f"{definition.code}\nWhat is it called?"),
            ("assistant", definition.name.rpartition(".")[2]),
            ("user", "What does it do?"),
            ("assistant", docstring),
        )
        return Dialogue(turns, where=definition.name)

    return Task(
        name="python_dialogue",
        kind="dialogue",
        labels=("user", "assistant"),
        metrics=("f1", "rougeL", "distinct_2"),
        splits=library_splits(build, size),
    )
