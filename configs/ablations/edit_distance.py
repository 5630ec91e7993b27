"""The article's edit-distance regulariser on and off, on single tokens and on spans of chosen length."""

from gpt_jax.ablation import Ablation
from gpt_jax.ablation.presets import tiny_text


def get_config():
    config = tiny_text()
    config.objective = dict(name="masked_lm", coefs={"mlm": 1.0, "edit": 0.0}, rate=0.15)
    config.data.doc_mask = True
    return config


def get_ablation():
    hidden = {
        "tokens": {},
        "spans of 3": {"objective.select": "spans", "objective.span": 3},
        "spans of 8": {"objective.select": "spans", "objective.span": 8},
    }
    arms, against = {}, {}
    for name, options in hidden.items():
        arms[name] = options
        arms[f"{name}, edit"] = {**options, "objective.coefs": {"mlm": 1.0, "edit": 1.0}}
        against[f"{name}, edit"] = (name,)
    return Ablation(
        question="Does regularising a masked LM by the soft edit distance lower its edit distance or its loss, and "
        "does that depend on how long the hidden spans are?",
        config=get_config(),
        arms=arms,
        against=against,
        metrics=("valid/mlm_nll", "valid/accuracy", "valid/edit_distance"),
        reading="An arm with the regulariser is compared with the one that hides spans of the same length without it; "
        "lengths among each other are not compared: they are asked different questions.",
    )
