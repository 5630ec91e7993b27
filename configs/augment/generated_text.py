r"""Pre-training on text that a model wrote, at equal steps, judged on real held-out text (docs/augment.md).

    gpt-jax train --config=augment/generated_text --workdir=runs/text/base
    gpt-jax augment --method=text --from=runs/text/base --top-p=1 --max-tokens=120 --documents=6000 --out=runs/text/all
    gpt-jax augment --method=text --from=runs/text/base --top-p=1 --max-tokens=120 --documents=12000 \
      --reference=runs/text/base --band=0.25,0.75 --out=runs/text/band
    gpt-jax ablate --config=augment/generated_text --workdir=runs/text/ablation
"""

from gpt_jax.ablation import Ablation
from gpt_jax.ablation.presets import tiny_text

RUNS = "runs/text"


def get_config():
    return tiny_text()


def sources(real, generated, folder):
    """The overrides of an arm that reads real and generated text in these shares."""
    return {
        "data.sources": (
            {"name": "real", "weight": real, "corpus": "python_docs"},
            {"name": "generated", "weight": generated, "path": f"{RUNS}/{folder}/store"},
        )
    }


def get_ablation():
    config = get_config()
    config.data.tokenizer.path = f"{RUNS}/base/tokenizer"
    mixed = sources(1.0, 1.0, "all")
    excess = {"init.from": f"{RUNS}/base", "init.rename": (("^model/", "reference/"),), "objective.reweight": "excess"}
    return Ablation(
        question="What is text of the model's own worth to pre-training, beside real text and instead of it?",
        config=config,
        arms={
            "real": sources(1.0, 0.0, "all"),
            "real and generated": mixed,
            "real and generated, band": sources(1.0, 1.0, "band"),
            "generated": sources(0.0, 1.0, "all"),
            "generated, band": sources(0.0, 1.0, "band"),
            "real and generated, reweighted by perplexity": {**mixed, "objective.reweight": "perplexity"},
            "real and generated, reweighted by excess": {**mixed, **excess},
        },
        metrics=("valid/real/bits_per_byte",),
        reading="Validation is on real text in every arm. One generator of the same size, trained as long on the same "
        "real text, wrote all generated text; seeds differ in initial weights and order.",
    )
