"""Rates of a mixture of objectives: text, docstrings from code and kinds of objects, in other proportions."""

from gpt_jax.ablation import Ablation
from gpt_jax.ablation.presets import tiny_text


def mixture(text, docstrings, kinds):
    return dict(
        name="mixture",
        tasks={
            "text": dict(name="causal_lm", rows=text),
            "docstrings": dict(name="supervised", rows=docstrings, data={"tasks": ("python_docstrings",)}, max_new=8),
            "kinds": dict(name="classify", rows=kinds, data={"tasks": ("python_kinds",)}),
        },
    )


def get_config():
    config = tiny_text()
    config.objective = mixture(8, 4, 4)
    config.eval.update(every_steps=0, max_generated=1)
    return config


def get_ablation():
    return Ablation(
        question="How much does each objective of a mixture gain from its share of the rows, and what do others lose?",
        config=get_config(),
        arms={
            "8 text, 4 docstrings, 4 kinds": {},
            "12 text, 2 docstrings, 2 kinds": {"objective": mixture(12, 2, 2)},
            "4 text, 8 docstrings, 4 kinds": {"objective": mixture(4, 8, 4)},
            "4 text, 4 docstrings, 8 kinds": {"objective": mixture(4, 4, 8)},
        },
        metrics=("valid/text/bits_per_byte", "valid/docstrings/nll", "valid/kinds/accuracy"),
    )
