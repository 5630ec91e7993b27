"""The article's masked language model, as it says and as it may be meant, beside BERT's."""

from gpt_jax.ablation import Ablation
from gpt_jax.ablation.presets import tiny_text


def get_config():
    config = tiny_text(360)
    config.objective = dict(name="masked_lm", coefs={"mlm": 1.0}, rate=0.15, corruption="bert", shares=(0.8, 0.1, 0.1))
    config.data.doc_mask = True
    return config


def get_ablation():
    return Ablation(
        question="What does each way to hide tokens teach, asked in the same terms: BERT's masking of held-out text?",
        config=get_config(),
        arms={
            "bert 80/10/10": {},
            "all [MASK]": {"objective.shares": (1.0, 0.0, 0.0)},
            "all random": {"objective.shares": (0.0, 1.0, 0.0)},
            "fair (article)": {"objective.corruption": "fair"},
            "literal (article)": {"objective.corruption": "literal"},
            "spans": {"objective.select": "spans"},
        },
        metrics=("bert_masking/mlm_nll", "bert_masking/accuracy"),
        measures=("gpt_jax.ablation.measures:bert_masking",),
        reading="'valid/loss' of the arms asks different questions and is not compared. BERT's own arm is trained on "
        "the very question that all are asked. 'literal' can learn no more than how frequent tokens are: a control.",
    )
