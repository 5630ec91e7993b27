"""Docstrings from code: the first paragraph of what a function or class of Python's library says of itself."""

from gpt_jax.tasks.base import Task, TextToText
from gpt_jax.tasks.python_library import Definition, library_splits
from gpt_jax.tasks.readers import Row


def task(
    size: int = 5000, longest_code: int = 600, longest_docstring: int = 200, template: str = "{code}\n# Docstring:\n"
) -> Task:
    """Embedded: nothing is downloaded. Lengths are in characters; longer ones are left out."""

    def build(definition: Definition) -> TextToText | None:
        docstring = " ".join(definition.doc.partition("\n\n")[0].split())
        if definition.kind == "module" or len(definition.code) > longest_code:
            return None
        if len(docstring) > longest_docstring or len(docstring.split()) < 3:
            return None
        source = Row(definition.name, {"code": definition.code}).fill(template)
        return TextToText(source, docstring, where=definition.name)

    return Task(
        name="python_docstrings",
        kind="text_to_text",
        metrics=("bleu", "rougeL", "distinct_2"),
        splits=library_splits(build, size),
    )
