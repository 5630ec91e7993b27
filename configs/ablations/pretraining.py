"""Causal LM, masked LM and replaced-token detection at equal compute, judged by what they are worth to a task."""

from gpt_jax.ablation import Ablation
from gpt_jax.ablation.presets import tiny_task, tiny_text
from gpt_jax.config import resolve
from gpt_jax.model.size import count_parameters
from gpt_jax.objectives.replaced_token import generator_config

STEPS = 240  # of the causal LM; the others get as many as cost the same
MLM = dict(name="masked_lm", coefs={"mlm": 1.0}, rate=0.15)
RTD = dict(name="replaced_token", coefs={"mlm": 1.0, "rtd": 50.0}, fraction=0.25, rate=0.15)


def get_config():
    config = tiny_task(dict(name="classify", coefs={"classify": 1.0}), ("python_kinds",), 120)
    config.optimizer.learning_rate = 0.01
    config.data.corpus = "python_source"  # of the tokenizer: that of the pre-training
    return config


def pretraining():
    config = tiny_text(STEPS)
    config.data.corpus = "python_source"
    config.data.doc_mask = True
    config.eval.update(every_steps=0, max_batches=6)
    return config


def compute(model, output, vocab_size, length):
    """Per token, up to a factor: products of the blocks, attention, and the output layer on a part of the tokens."""
    table = vocab_size * model.embed_size
    blocks = count_parameters(model) - table
    return blocks + 2 * model.num_layers * model.d_model * length + output * table


def get_ablation():
    config = resolve(pretraining())
    vocab_size, length = config.data.tokenizer.vocab_size, config.context_length
    model = resolve(pretraining(), {"model.vocab_size": vocab_size, "model.max_positions": length}).model
    masked = compute(model, 0.15, vocab_size, length)
    generator = generator_config(model, RTD["fraction"])
    replaced = compute(model, 0.0, vocab_size, length) + compute(generator, 0.15, vocab_size, length)
    causal = compute(model, 1.0, vocab_size, length)

    def after(objective, cost, mask):
        steps = {"@pretrain.steps": round(STEPS * causal / cost)}
        return {"init.from": "@pretrain", "@pretrain.objective": objective, "objective.mask": mask, **steps}

    return Ablation(
        question="Which pre-training is worth most to a small classification task, at equal compute?",
        config=get_config(),
        before={"pretrain": pretraining()},
        arms={
            "causal LM": after(dict(name="causal_lm"), causal, "causal"),
            "causal LM, then both ways": after(dict(name="causal_lm"), causal, "bidirectional"),
            "masked LM": after(MLM, masked, "bidirectional"),
            "replaced tokens": after(RTD, replaced, "bidirectional"),
            "none, causal": {"objective.mask": "causal"},
            "none, both ways": {"objective.mask": "bidirectional"},
        },
        metrics=("valid/accuracy", "valid/loss"),
        reading="Pre-training reads the library's source, which holds the texts (never the labels) of the task's "
        "validation set too. The table of budgets shows the compute that was counted.",
    )
