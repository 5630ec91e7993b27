"""Sizes by name: GPT-3's eight models (Brown et al. 2020, Table 2.1), GPT-2's four (Radford et al. 2019), Llama 2's.

A config uses one so:

    preset = PRESETS["gpt3_125m"]
    config.context_length = preset.context_length
    config.batch_size = preset.batch_size
    config.model.update(preset.model)
    config.optimizer.learning_rate = preset.learning_rate

Table 2.1 prints two rows whose heads do not make up d_model; the parameter counts of its Table D.1 settle both:
XL has 16 heads of 128 (printed: 24), 13B has d_model 5120 (printed: 5140). GPT-3 discloses neither the width of its
banded layers nor which they are: here every second layer is a band of 256, after GPT-Neo.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_collections

from gpt_jax.config import base
from gpt_jax.model.config import ModelConfig

GPT2_VOCAB = 50257


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published model.

    Attributes:
      model: overrides of ModelConfig. context_length: tokens of a sequence. batch_size: sequences of a batch.
      learning_rate: at the peak. parameters: exact number, padding of the vocabulary excluded.
    """

    model: dict[str, Any]
    context_length: int
    batch_size: int
    learning_rate: float
    parameters: int

    @property
    def batch_tokens(self) -> int:
        return self.batch_size * self.context_length

    def config(self, **overrides: Any) -> ModelConfig:
        """Returns the model's config, with its own vocabulary and positions unless overridden."""
        return ModelConfig(**self.model | overrides)


def _preset(context: int, layers: int, width: int, heads: int, batch: int, lr: float, count: int, **extra) -> Preset:
    model = dict(
        vocab_size=GPT2_VOCAB, num_layers=layers, d_model=width, num_heads=heads, max_positions=context, **extra
    )
    return Preset(model, context, batch, lr, count)


def _gpt3(layers: int, width: int, heads: int, batch: int, lr: float, count: int) -> Preset:
    return _preset(2048, layers, width, heads, batch, lr, count, pattern=("dense", "band"), window=256)


# Batches are Table 2.1's tokens (0.5M, 1M, 2M, 3.2M) in sequences of 2,048.
GPT3: dict[str, Preset] = {
    "gpt3_125m": _gpt3(12, 768, 12, 256, 6e-4, 125_226_240),
    "gpt3_350m": _gpt3(24, 1024, 16, 256, 3e-4, 355_871_744),
    "gpt3_760m": _gpt3(24, 1536, 16, 256, 2.5e-4, 760_300_032),
    "gpt3_1b3": _gpt3(24, 2048, 16, 512, 2e-4, 1_315_723_264),
    "gpt3_2b7": _gpt3(32, 2560, 32, 512, 1.6e-4, 2_651_553_280),
    "gpt3_6b7": _gpt3(32, 4096, 32, 1024, 1.2e-4, 6_658_404_352),
    "gpt3_13b": _gpt3(40, 5120, 40, 1024, 1e-4, 12_853_386_240),
    "gpt3_175b": _gpt3(96, 12288, 96, 1536, 6e-5, 174_604_259_328),
}

# GPT-2's learning rates are not published: these are those of the GPT-3 model of about the same size.
GPT2: dict[str, Preset] = {
    "gpt2_124m": _preset(1024, 12, 768, 12, 512, 6e-4, 124_439_808),
    "gpt2_355m": _preset(1024, 24, 1024, 16, 512, 3e-4, 354_823_168),
    "gpt2_774m": _preset(1024, 36, 1280, 20, 512, 2.5e-4, 774_030_080),
    "gpt2_1558m": _preset(1024, 48, 1600, 25, 512, 2e-4, 1_557_611_200),
}


def _llama2(layers: int, width: int, heads: int, kv_heads: int, d_ff: int, lr: float, count: int) -> Preset:
    model = dict(
        vocab_size=32_000,
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        d_ff=d_ff,
        positions="rope",
        norm="rmsnorm",
        ffn="swiglu",
        bias=False,
        tie_embeddings=False,
        scale_residual_init=False,
    )
    return Preset(model, 4096, 1024, lr, count)


# Llama 2 (Touvron et al. 2023): 4M tokens a batch in sequences of 4,096.
LLAMA2: dict[str, Preset] = {
    "llama2_7b": _llama2(32, 4096, 32, 0, 11008, 3e-4, 6_738_415_616),
    "llama2_70b": _llama2(80, 8192, 64, 8, 28672, 1.5e-4, 68_976_648_192),
}

PRESETS: dict[str, Preset] = GPT3 | GPT2 | LLAMA2

# GPT-3, appendix B: tokens.
GPT3_WARMUP = "375Mtok"
GPT3_DECAY = "260Btok"
GPT3_TOKENS = 300_000_000_000
# The batch grows linearly from 32k tokens "over the first 4-12 billion tokens of training, depending on the model
# size": which size takes how many is not published. Billions of tokens by the full batch in sequences.
GPT3_RAMP = {256: 4, 512: 6, 1024: 8, 1536: 12}
GPT3_FIRST_BATCH = 16  # sequences of 2,048 tokens


def gpt3(name: str) -> ml_collections.ConfigDict:
    """Returns the config of a GPT-3 run: its model, batch, learning rate and schedules in tokens (appendix B).

    The batch grows at first, as far as micro-batches are smaller than it; `steps` are for 300 billion tokens where it
    grows by 32k at a time. Reads text of your own; GPT-3's data are not published.
    """
    preset = PRESETS[name]
    config = base()
    first, full = GPT3_FIRST_BATCH * preset.context_length, preset.batch_tokens
    ramp = GPT3_RAMP[preset.batch_size] * 1e9
    sizes = range(first, full, first)
    config.steps = round(sum(ramp / len(sizes) / size for size in sizes) + (GPT3_TOKENS - ramp) / full)
    config.batch_schedule = ((f"{GPT3_RAMP[preset.batch_size]}Btok", (GPT3_FIRST_BATCH, 0)),)
    config.batch_size = preset.batch_size
    config.context_length = preset.context_length
    config.model.update(**preset.model, dtype="bfloat16", unroll=1, remat="full")
    config.data.path = "$GPT_JAX_DATA/pretrain/*.jsonl.zst"
    config.data.tokenizer.update(kind="gpt2", path="$GPT_JAX_DATA/gpt2_bpe", specials=("eot",))
    config.optimizer.update(learning_rate=preset.learning_rate, warmup=GPT3_WARMUP, decay=GPT3_DECAY)
    config.eval.update(every_steps=2000, max_batches=50)
    config.checkpoint.every_steps = 2000
    config.log.every_steps = 10
    return config


def llama2(name: str) -> ml_collections.ConfigDict:
    """Returns the config of a run of Llama 2's size and recipe (section 2) on text of your own."""
    preset = PRESETS[name]
    config = base()
    config.steps = 500_000
    config.batch_size = preset.batch_size
    config.context_length = preset.context_length
    config.model.update(**preset.model, dtype="bfloat16", unroll=1, remat="full")
    config.data.path = "$GPT_JAX_DATA/pretrain/*.jsonl.zst"
    config.data.tokenizer.update(kind="hf", path="$GPT_JAX_DATA/llama2_tokenizer", specials=())
    config.optimizer.update(learning_rate=preset.learning_rate, warmup="2000", end_factor=0.1)
    config.eval.update(every_steps=2000, max_batches=50)
    config.checkpoint.every_steps = 2000
    config.log.every_steps = 10
    return config


def novels_3m() -> ml_collections.ConfigDict:
    """Returns the config of a GPT of 2.6M parameters on English novels: what the small experiments fine-tune from."""
    config = base()
    config.steps = 900
    config.batch_size = 32
    config.context_length = 256
    config.model.update(num_layers=4, d_model=192, num_heads=3)
    config.model.update(positions="rope", norm="rmsnorm", ffn="relu2", qk_norm=True, bias=False)
    config.data.path = "$GPT_JAX_DATA/lm/novels_en_train.jsonl.xz"
    config.data.valid_path = "$GPT_JAX_DATA/lm/novels_en_valid.jsonl.xz"
    config.data.tokenizer.vocab_size = 4096
    config.optimizer.update(name="muon", learning_rate=0.02, weight_decay=0.05, end_factor=0.05)
    config.eval.update(every_steps=150, max_batches=10)
    config.checkpoint.every_steps = 150
    config.sample.prompts = ("It was ",)
    return config


def fine_tune(
    objective: dict[str, Any], tasks: tuple[Any, ...], *, steps: int, batch_size: int, context_length: int
) -> ml_collections.ConfigDict:
    """Returns the config of a run of `novels_3m` on tasks: `init.from` names the run whose weights it starts from.

    Without it the same model starts from scratch, with the tokenizer that `data.tokenizer.path` names or a new one. The
    optimizer is Muon, that of the pre-training: under AdamW its weights hardly move.
    """
    config = novels_3m()
    config.steps, config.batch_size, config.context_length = steps, batch_size, context_length
    config.objective = objective
    config.data.tasks = tasks
    config.optimizer.update(learning_rate=0.02, warmup="10%", weight_decay=0.01, end_factor=0.0)
    config.eval.update(every_steps=max(1, steps // 4), max_batches=0, max_generated=50)
    config.checkpoint.every_steps = max(1, steps // 2)
    config.sample.prompts = ()
    return config
