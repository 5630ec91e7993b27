"""Shakespeare by characters at nanoGPT's GPU setting: 6 layers, width 384, dropout 0.2, 5,000 steps of 64 x 256."""

from gpt_jax.config import base


def get_config():
    config = base()
    config.steps = 5000
    config.batch_size = 64
    config.context_length = 256
    config.model.update(num_layers=6, d_model=384, num_heads=6, bias=False, dropout=0.2)
    config.data.update(path="$GPT_JAX_DATA/lm/tinyshakespeare.txt.xz", split="tail", valid_fraction=0.1)
    config.data.tokenizer.update(kind="char", vocab_size=0, specials=("eot",))
    config.optimizer.update(learning_rate=1e-3, b2=0.99, warmup="100")
    config.eval.update(every_steps=250, max_batches=0)
    config.sample.prompts = ("ROMEO:",)
    return config
