"""Opens a run: model, parameters, tokenizer and config, for a notebook or a command."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax.checkpoint import find_checkpoint, list_arrays, read_metadata
from gpt_jax.checkpoint_parts import load_params
from gpt_jax.config import Config, resolve
from gpt_jax.data import Tokenizer, load_tokenizer
from gpt_jax.errors import UserError, choose
from gpt_jax.model import Transformer
from gpt_jax.objectives.base import Objective, Setting, bidirectional_prompt, build_objective


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What `load` returns: `model.apply({"params": params}, tokens)` runs it.

    Attributes:
      params: of the root "model". all_params: every root of the run. step: of the checkpoint.
    """

    model: Transformer
    params: Any
    tokenizer: Tokenizer
    config: Config
    step: int
    all_params: Any

    @property
    def objective(self) -> Objective:
        """What the run trains, but for the labels of its tasks."""
        config = self.config
        setting = Setting(config.model, self.tokenizer.specials, config.steps, config.batch_size, config.context_length)
        return build_objective(config.objective, setting)

    @property
    def bidirectional_prompt(self) -> bool:
        """Whether the tokens of a prompt see each other, as in the run's training: the argument of `generate`."""
        return bidirectional_prompt(self.config.objective)


def load(path: str | os.PathLike, *, step: int | None = None, weights: str = "auto") -> Loaded:
    """Opens a run's workdir, its folder of checkpoints, or one checkpoint.

    Args:
      path: where. step: which checkpoint; None is the newest.
      weights: raw | ema | average (of a schedule-free optimizer) | auto (an average where the run kept one).

    Raises:
      UserError: nothing there, or it is damaged.
    """
    choose("weights", weights, ("auto", "raw", "ema", "average"))
    folder, step = find_checkpoint(path, step)
    metadata = read_metadata(folder, step)
    config = resolve(metadata["config"])
    params = read_params(folder, step, weights)
    return Loaded(Transformer(config.model), params["model"], tokenizer_of(metadata), config, step, params)


def read_params(folder: pathlib.Path, step: int, weights: str, abstract: Any | None = None) -> dict[str, Any]:
    """The parameters that evaluation and sampling read, as `TrainState.eval_params` chooses them.

    Args:
      abstract: nested dicts of ShapeDtypeStruct of those to read; None reads all. Frozen ones are among them only
        where the optimizer keeps no average.
    """
    names = list_arrays(folder, step)
    average = next((n.removesuffix("/weight_sum") for n in names if n.endswith("/weight_sum")), None)
    has_ema = any(n.startswith("ema/") for n in names)
    if weights == "ema" and not has_ema:
        raise UserError(f"weights is 'ema', but the run in {str(folder)!r} kept no average (optimizer.ema is 0).")
    if weights == "average" and average is None:
        raise UserError(f"weights is 'average', but the optimizer of the run in {str(folder)!r} keeps none.")
    if average is not None and weights in ("average", "auto"):  # x = (y - (1 - b1) z) / b1, of optax's schedule_free
        y, z = (load_params(folder, abstract, root=root, step=step) for root in ("params", f"{average}/z"))
        b1 = load_params(folder, {"b1": jax.ShapeDtypeStruct((), "float32")}, root=average, step=step)["b1"]
        latest = dict(jax.tree_util.tree_leaves_with_path(z))

        def mean(path: Any, y: jax.Array) -> jax.Array:
            z = latest.get(path, y)  # frozen parameters are their own average
            return jnp.where(y == z, y, (y - (1.0 - b1) * z) / b1)

        return jax.tree_util.tree_map_with_path(mean, y)
    return load_params(folder, abstract, root="ema" if has_ema and weights != "raw" else "params", step=step)


def tokenizer_of(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a checkpoint carries with it."""
    import base64

    with tempfile.TemporaryDirectory() as folder:
        for name, data in metadata["tokenizer"].items():
            path = pathlib.Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(data))
        return load_tokenizer(folder)
