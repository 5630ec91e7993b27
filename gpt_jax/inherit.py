"""What a run takes from a run directory: its own when it is built again, another's when it starts from its weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from gpt_jax.checkpoint import list_steps, read_metadata
from gpt_jax.config import Config, resolve
from gpt_jax.data import Tokenizer, load_tokenizer
from gpt_jax.data.tokenizer_choice import existing_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.loading import tokenizer_of
from gpt_jax.remote import run_folder
from gpt_jax.workdir import Workdir, open_workdir

# How a model is executed or regularised: what a run that starts from another's weights chooses for itself.
OWN_MODEL_KEYS = re.compile(
    r"attention|query_block|flatten|unroll|remat|dtype|param_dtype|dropout|init_std|scale_residual_init|lora_.*"
)

ROPE_KEYS = ("rope_scaling", "rope_factor", "rope_low_frequency", "rope_high_frequency", "rope_original_context")


def _run_part(source: str) -> str:
    return re.sub(r"/checkpoints(/\d+)?/*$", "", source)


def _run_of(source: str) -> str:
    """The run directory of a run, of its folder of checkpoints or of one checkpoint; "" where there is none."""
    run = _run_part(source)
    return run if (run_folder(run, "init.from") / "config.json").exists() else ""


def following_init(config: Config, log: Callable[[str], None], begun: Mapping[str, Any] | None = None) -> Config:
    """A run that starts from another's weights has its model's shape (unless init.model is False) and its tokenizer
    (unless data.tokenizer.path names one).

    Args:
      begun: the saved config of the run itself, if it was begun: it tells what the other had once that one is gone.
    """
    given = config.init.source
    source = _run_of(given) if given else ""
    if source:
        path = f"{source.rstrip('/')}/tokenizer"
        path = path if (run_folder(source, "init.from") / "tokenizer").is_dir() else ""
        theirs, what = resolve(saved_config(source)), f"of {source}, whose weights the run starts from"
    elif given and begun and not run_folder(given, "init.from").exists():
        theirs, what = resolve(begun), f"of {given}, whose weights the run started from, as it has them (that is gone)"
        path = theirs.data.tokenizer.path
        path = path if path == f"{_run_part(given).rstrip('/')}/tokenizer" else ""
    else:
        return config
    if config.init.model:
        shape = dataclasses.asdict(theirs.model)
        if config.model.rope_scaling != "none":  # it reads a longer context than theirs
            shape = {key: value for key, value in shape.items() if key not in ROPE_KEYS}
        changed = {
            key: value
            for key, value in shape.items()
            if value != getattr(config.model, key) and not OWN_MODEL_KEYS.fullmatch(key)
        }
        if changed:
            log(f"model {what}: {', '.join(f'{key}={value!r}' for key, value in changed.items())}")
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changed))
    if path and not config.data.tokenizer.path:
        log(f"tokenizer {what}")
        tokenizer = dataclasses.replace(config.data.tokenizer, path=path, keep=0)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
    return config


def saved_run(workdir: str, overrides: Mapping[str, str] = MappingProxyType({})) -> tuple[Config, Tokenizer | None]:
    """Returns the config of the run in a directory, overridden, and its tokenizer: whatever text an override names is
    read with that one. `build_run` builds the run again of the two.

    Raises:
      UserError: no run there; an override of `data.tokenizer` that asks for another one.
    """
    tree = saved_config(workdir)
    with open_workdir(workdir, lock=False) as directory:
        tokenizer = saved_tokenizer(directory)
    config, asked = resolve(tree, overrides), [key for key in overrides if key.startswith("data.tokenizer")]
    if tokenizer and asked and config.data.tokenizer != resolve(tree).data.tokenizer:
        same = asked == ["data.tokenizer.path"] and existing_tokenizer(config.data.tokenizer).hash == tokenizer.hash
        if not same:
            raise UserError(
                f"--config.{asked[0]}: the run in {workdir!r} has its own tokenizer ({tokenizer.kind}, "
                f"{tokenizer.vocab_size} tokens), which no other can stand for."
            )
    return config, tokenizer


def saved_tokenizer(directory: Workdir) -> Tokenizer | None:
    """Returns the tokenizer that a run directory, or else its newest checkpoint, holds; None if no run was begun."""
    if directory.is_new:
        return None
    if directory.tokenizer_path.is_dir():
        return load_tokenizer(directory.tokenizer_path)
    if not list_steps(directory.checkpoints_path):
        return None
    metadata = read_metadata(directory.checkpoints_path)
    return tokenizer_of(metadata) if metadata.get("tokenizer") else None


def saved_config(workdir: str) -> dict[str, Any]:
    """Returns the resolved config that a run directory holds; raises UserError if it holds none."""
    with open_workdir(workdir, lock=False) as directory:
        tree = directory.read_config()
    if tree is None:
        raise UserError(f"{workdir!r} holds no run: it has no config.json.")
    return tree
