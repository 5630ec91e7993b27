"""Declaring options: a dataclass field with a default and one line of meaning; naming code by import path."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
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


def is_number(value: Any) -> bool:
    """Whether a value is a number: nan, True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _is_sequence_of(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple | list) and all(map(fits, value))


# What an option's annotation takes; others are left to whoever reads the option.
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "str": (lambda value: isinstance(value, str), "text"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "int": (lambda value: isinstance(value, int) and is_number(value), "a whole number"),
    "float": (lambda value: is_number(value) and math.isfinite(value), "a number"),
    "Mapping[str, Any]": (lambda value: isinstance(value, Mapping), "a table"),
    "tuple[int, ...]": (
        lambda value: _is_sequence_of(value, lambda v: isinstance(v, int) and is_number(v)),
        "a tuple of whole numbers",
    ),
    "tuple[float, ...]": (lambda value: _is_sequence_of(value, is_number), "a tuple of numbers"),
    "tuple[tuple[Any, ...], ...]": (
        lambda value: _is_sequence_of(value, lambda v: isinstance(v, tuple | list)),
        "a tuple of tuples",
    ),
}


def check_type(key: str, value: Any, annotation: Any) -> None:
    """Raises UserError for a value that is not of the type that an option's annotation, text or a class, names."""
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    fits, said = _TYPES.get(name.removesuffix(" | None"), (lambda _: True, ""))
    if not fits(value) and not (value is None and name.endswith(" | None")):
        raise UserError(f"{key} is {value!r}; it takes {said}.")
