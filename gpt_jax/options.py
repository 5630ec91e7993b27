"""Declaring options: a dataclass field with a default and one line of meaning; naming code by import path."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from gpt_jax.errors import UserError


def option(default: Any, help: str) -> Any:
    """A dataclass field whose `help` is what `--print-config` and the docs say of it."""
    metadata = {"help": help}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def import_path(path: str) -> Any:
    """Returns the object that 'package.module:name' names; raises UserError when it cannot be had."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot import {path!r}: {error}.") from None
