"""GPT-2 small at nanoGPT's recipe: 12 layers, width 768, context 1,024, about half a million tokens a batch.

Reads tokens of GPT-2's BPE: nanoGPT's train.bin and val.bin, or any text.
"""

from gpt_jax.config import base
from gpt_jax.presets import PRESETS


def get_config():
    config = base()
    config.steps = 600_000
    config.batch_size = 480
    config.context_length = 1024
    config.model.update(**PRESETS["gpt2_124m"].model, dtype="bfloat16", unroll=1)
    config.data.update(path="$GPT_JAX_DATA/openwebtext/train.bin", valid_path="$GPT_JAX_DATA/openwebtext/val.bin")
    config.data.tokenizer.update(kind="gpt2", path="$GPT_JAX_DATA/gpt2_bpe", specials=("eot",))
    config.optimizer.update(learning_rate=6e-4, warmup="2000")
    config.eval.update(every_steps=1000, max_batches=50)
    config.checkpoint.every_steps = 2000
    config.log.every_steps = 10
    return config
