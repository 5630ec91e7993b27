"""The article's edit-distance regulariser on and off, on single tokens and on spans."""

from gpt_jax.ablation import Ablation
from gpt_jax.ablation.presets import tiny_text


def get_config():
    config = tiny_text()
    config.objective = dict(name="masked_lm", coefs={"mlm": 1.0, "edit": 0.0}, rate=0.15)
    config.data.doc_mask = True
    return config


def get_ablation():
    on, weak = {"mlm": 1.0, "edit": 1.0}, {"mlm": 1.0, "edit": 0.1}
    spans = {"objective.select": "spans"}
    return Ablation(
        question="Does regularising a masked LM by the soft edit distance lower its edit distance or its loss, and "
        "does that depend on hiding single tokens or spans?",
        config=get_config(),
        arms={
            "tokens": {},
            "tokens, edit 0.1": {"objective.coefs": weak},
            "tokens, edit 1": {"objective.coefs": on},
            "spans": spans,
            "spans, edit 0.1": {**spans, "objective.coefs": weak},
            "spans, edit 1": {**spans, "objective.coefs": on},
        },
        against={"spans, edit 0.1": ("spans",), "spans, edit 1": ("spans",)},
        metrics=("valid/mlm_nll", "valid/accuracy", "valid/edit_distance"),
        reading="Spans have 3.8 tokens on average. Arms on spans are compared with spans, the others with tokens: the "
        "two are asked different questions.",
    )
