"""ELECTRA's replaced-token detection on the embedded corpus: a minute or two on two cores, nothing downloaded."""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 200
    config.batch_size = 16
    config.context_length = 128
    config.model.update(num_layers=2, d_model=128, num_heads=4)
    config.model.update(positions="rope", norm="rmsnorm", ffn="relu2", qk_norm=True, bias=False)
    config.objective = dict(
        name="replaced_token",
        coefs={"mlm": 1.0, "rtd": 50.0},
        fraction=0.25,
        share="embeddings",
        rate=0.15,
    )
    config.data.doc_mask = True
    config.data.tokenizer.vocab_size = 2048
    config.optimizer.update(name="muon", learning_rate=0.02, weight_decay=0.05, end_factor=0.05)
    config.eval.every_steps = 100
    return config
