"""Shakespeare by characters at nanoGPT's CPU setting: 4 layers, width 128, 2,000 steps of 12 x 64 characters."""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 2000
    config.batch_size = 12
    config.context_length = 64
    config.model.update(num_layers=4, d_model=128, num_heads=4, bias=False)
    config.data.update(path="$GPT_JAX_DATA/lm/tinyshakespeare.txt.xz", split="tail", valid_fraction=0.1)
    config.data.tokenizer.update(kind="char", vocab_size=0, specials=("eot",))
    config.optimizer.update(learning_rate=2e-3, b2=0.99, warmup="100")
    config.eval.update(every_steps=500, batch_size=48, max_batches=0)
    config.sample.prompts = ("ROMEO:",)
    return config
