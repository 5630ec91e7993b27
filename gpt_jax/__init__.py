"""gpt_jax: GPT research in JAX/Flax. Every objective is a plug-in loss of one jitted update.

from gpt_jax import CausalLM, ModelConfig, Transformer, build_train_step, make_optimizer
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt_jax.eval_step import build_eval_step as build_eval_step
    from gpt_jax.generation import generate as generate
    from gpt_jax.loading import load as load
    from gpt_jax.model import Mask as Mask
    from gpt_jax.model import ModelConfig as ModelConfig
    from gpt_jax.model import Transformer as Transformer
    from gpt_jax.objectives import Objective as Objective
    from gpt_jax.objectives.causal_lm import CausalLM as CausalLM
    from gpt_jax.objectives.compose import Mixture as Mixture
    from gpt_jax.objectives.compose import Sum as Sum
    from gpt_jax.objectives.masked_lm import MaskedLM as MaskedLM
    from gpt_jax.objectives.replaced_token import ReplacedToken as ReplacedToken
    from gpt_jax.optim import make_optimizer as make_optimizer
    from gpt_jax.optim import make_schedule as make_schedule
    from gpt_jax.sharding import make_mesh as make_mesh
    from gpt_jax.step import build_train_step as build_train_step
    from gpt_jax.train_state import TrainState as TrainState

_WHERE = {
    "CausalLM": "gpt_jax.objectives.causal_lm",
    "Mask": "gpt_jax.model",
    "MaskedLM": "gpt_jax.objectives.masked_lm",
    "Mixture": "gpt_jax.objectives.compose",
    "ModelConfig": "gpt_jax.model",
    "Objective": "gpt_jax.objectives",
    "ReplacedToken": "gpt_jax.objectives.replaced_token",
    "Sum": "gpt_jax.objectives.compose",
    "TrainState": "gpt_jax.train_state",
    "Transformer": "gpt_jax.model",
    "build_eval_step": "gpt_jax.eval_step",
    "build_train_step": "gpt_jax.step",
    "generate": "gpt_jax.generation",
    "load": "gpt_jax.loading",
    "make_mesh": "gpt_jax.sharding",
    "make_optimizer": "gpt_jax.optim",
    "make_schedule": "gpt_jax.optim",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    # Imported when asked for: `gpt-jax --help` and a mistyped config should not wait for jax.
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'gpt_jax' has no attribute {name!r}")
