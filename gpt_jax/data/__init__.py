"""Text to batches: corpora, tokenizers, token stores, and batches that are a function of (config, seed, step)."""

import importlib

__all__ = ["Data", "Loader", "Tokenizer", "load_tokenizer", "prepare_data"]

_HOMES = {
    "Data": "prepare",
    "prepare_data": "prepare",
    "Loader": "loader",
    "Tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
}


def __getattr__(name: str):
    # On demand: the processes that tokenize import this package and need none of jax.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
