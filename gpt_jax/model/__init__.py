"""The model: Flax Linen modules used as pure functions; it knows neither objectives nor data."""

from gpt_jax.model.attention import Mask
from gpt_jax.model.cache import Cache
from gpt_jax.model.config import ModelConfig
from gpt_jax.model.size import count_parameters
from gpt_jax.model.transformer import Output, Transformer

__all__ = ["Cache", "Mask", "ModelConfig", "Output", "Transformer", "count_parameters"]
