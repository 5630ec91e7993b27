"""Reweighting texts by perplexity ("diversity"), judged by loss and by what the model then writes."""

from gpt_jax.ablation import Ablation
from gpt_jax.ablation.presets import tiny_text


def get_config():
    config = tiny_text()
    config.objective = dict(name="causal_lm", reweight="none", alpha=0.5, clip=(0.5, 2.0))
    config.data.doc_mask = True
    return config


def reference():
    config = tiny_text(400)
    config.data.doc_mask = True
    config.eval.every_steps = 0
    config.seed = 9000  # one reference for all cells
    return config


def get_ablation():
    excess = {"init.from": "@reference", "init.rename": (("^model/", "reference/"),), "objective.reweight": "excess"}
    return Ablation(
        question="Does weighting hard texts more (A), hard tokens more (B) or texts harder than to a reference (C) "
        "make samples more diverse, and what does it cost?",
        config=get_config(),
        before={"reference": reference()},
        always=("reference",),
        arms={
            "none": {},
            "A perplexity": {"objective.reweight": "perplexity"},
            "B focal": {"objective.reweight": "focal"},
            "C excess": excess,
            "literal": {"objective.reweight": "literal"},
        },
        metrics=(
            "valid/bits_per_byte",
            "samples/distinct_2",
            "samples/self_bleu_4",
            "samples/seq_rep_4",
            "samples/reference_perplexity",
            "human/distinct_2",
            "human/self_bleu_4",
        ),
        measures=("gpt_jax.ablation.measures:sample_quality",),
        reading="Samples: 96 texts of up to 96 tokens at temperature 1. The reference is the same model trained for "
        "400 steps; it judges all arms, and weighs the texts of C, which it may favour. human/... is held-out text cut "
        "to the samples' lengths: its difference between arms is only that of the lengths.",
    )
