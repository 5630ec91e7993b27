"""Models of other codebases: one small mapping table per family, read and written as safetensors."""

from gpt_jax.interop.gpt2 import GPT2
from gpt_jax.interop.llama import LLAMA
from gpt_jax.interop.qwen3 import QWEN3

FAMILIES = {family.name: family for family in (GPT2, LLAMA, QWEN3)}
