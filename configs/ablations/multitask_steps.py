"""One task or two in the same weights, at equal steps per task and at equal total rows."""

from gpt_jax.ablation import Ablation
from gpt_jax.ablation.presets import tiny_text

TASK = ({"name": "python_docstrings", "size": 2500},)
DOCSTRINGS = dict(name="supervised", data={"tasks": TASK}, max_new=8)
KINDS = dict(name="classify", data={"tasks": ("python_kinds",)})


def mixture(**rows):
    specs = {"docstrings": DOCSTRINGS, "kinds": KINDS}
    return dict(name="mixture", tasks={name: dict(specs[name], rows=count) for name, count in rows.items()})


def get_config():
    config = tiny_text()
    config.batch_size = 8
    config.objective = mixture(docstrings=8)
    config.data.corpus = "python_source"
    config.eval.update(every_steps=0, max_generated=1, batch_size=16)
    return config


def get_ablation():
    alone = ("docstrings alone", "kinds alone")
    return Ablation(
        question="Do two tasks help or hinder each other in the same weights?",
        config=get_config(),
        arms={
            "docstrings alone": {},
            "kinds alone": {"objective": mixture(kinds=8)},
            "both, equal steps of each": {"objective": mixture(docstrings=8, kinds=8), "batch_size": 16},
            "both, equal rows in all": {"objective": mixture(docstrings=4, kinds=4)},
        },
        against={"both, equal steps of each": alone, "both, equal rows in all": alone},
        metrics=("valid/docstrings/nll", "valid/kinds/accuracy", "valid/kinds/loss"),
        reading="Each metric compares with the arm that trains its task alone on 8 rows a step.",
    )
