"""A tiny GPT on episodes of associative recall: scripts/in_context_learning.py writes them, trains and measures it."""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 600
    config.batch_size = 64
    config.context_length = 64
    config.model.update(num_layers=2, d_model=64, num_heads=4, d_ff=128)
    config.model.update(positions="alibi", norm="rmsnorm", bias=False)  # its steep slopes see the last token
    config.data.path = "runs/in_context/episodes.jsonl"
    config.data.layout = "padded"
    config.data.doc_mask = True
    config.data.tokenizer.update(kind="char", specials=("eot",))
    config.optimizer.update(name="muon", learning_rate=0.02, weight_decay=0.0, end_factor=0.05)
    config.eval.every_steps = 200
    config.sample.prompts = ()
    return config
