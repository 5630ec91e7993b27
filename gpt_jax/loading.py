"""Opens a run: model, parameters, tokenizer and config, for a notebook or a command."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from typing import Any

from gpt_jax.checkpoint import find_checkpoint, load_params, read_metadata
from gpt_jax.config import Config, resolve
from gpt_jax.data import Tokenizer, load_tokenizer
from gpt_jax.errors import UserError, choose
from gpt_jax.model import Transformer


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


def load(path: str | os.PathLike, *, step: int | None = None, weights: str = "auto") -> Loaded:
    """Opens a run's workdir, its folder of checkpoints, or one checkpoint.

    Args:
      path: where. step: which checkpoint; None is the newest.
      weights: raw | ema | auto (the moving average where the run kept one).

    Raises:
      UserError: nothing there, or it is damaged.
    """
    choose("weights", weights, ("auto", "raw", "ema"))
    folder, step = find_checkpoint(path, step)
    metadata = read_metadata(folder, step)
    config = resolve(metadata["config"])
    if weights == "ema" and not config.optimizer.ema:
        raise UserError(f"weights is 'ema', but the run in {str(path)!r} kept no average (optimizer.ema=0).")
    root = "ema" if config.optimizer.ema and weights != "raw" else "params"
    params = load_params(folder, None, root=root, step=step)
    model = Transformer(config.model)
    return Loaded(model, params["model"], _tokenizer(metadata), config, step, params)


def _tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a checkpoint carries with it."""
    import base64

    with tempfile.TemporaryDirectory() as folder:
        for name, data in metadata["tokenizer"].items():
            path = pathlib.Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(data))
        return load_tokenizer(folder)
