"""What models that learn nothing get on the validation text: a compressor and token frequencies, in bits per byte."""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_CHUNK = 1 << 20  # tokens counted at a time
_XZ_LIMIT = 64 << 20  # bytes: xz -9 takes about a second per megabyte


def baselines(data: Any) -> dict[str, float]:
    """Returns {"xz_bits_per_byte", "unigram_bits_per_byte"} on the validation text of a `Data`; {} if it has none.

    xz: xz -9e of the validation text alone (left out above 64 MB). unigram: the frequencies of the training tokens,
    one added to each, as a code for the validation tokens, EOTs included.
    """
    train = [split for name, split in data.splits.items() if name.rpartition("/")[2] == "train"]
    valid = [split for name, split in data.splits.items() if name.rpartition("/")[2] == "valid"]
    num_bytes = sum(split.num_bytes for split in valid)
    if not num_bytes:
        return {}
    out = {}
    if num_bytes <= _XZ_LIMIT:
        table = [data.tokenizer.token_bytes(token) for token in range(data.tokenizer.vocab_size)]
        text = b"".join(table[token] for split in valid for part in _parts(split) for token in part.tolist())
        out["xz_bits_per_byte"] = xz_bits_per_byte(text)
    counts = _counts(train, data.tokenizer.vocab_size)
    out["unigram_bits_per_byte"] = unigram_bits_per_byte(counts, _counts(valid, data.tokenizer.vocab_size), num_bytes)
    return out


def xz_bits_per_byte(text: bytes) -> float:
    """Bits that xz -9e needs per byte of a text."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def unigram_bits_per_byte(train_counts: np.ndarray, valid_counts: np.ndarray, num_bytes: int) -> float:
    """Bits per byte of valid tokens under add-one frequencies of the training tokens; counts are int [V]."""
    smoothed = train_counts + 1.0
    nats = -np.log(smoothed / smoothed.sum())
    return float((valid_counts * nats).sum() / (math.log(2) * num_bytes))


def _parts(split: Any) -> Iterator[np.ndarray]:
    for start in range(0, split.num_tokens, _CHUNK):
        yield split.read(start, min(_CHUNK, split.num_tokens - start))


def _counts(splits: list[Any], vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, np.int64)
    for split in splits:
        for part in _parts(split):
            counts += np.bincount(part, minlength=vocab_size)
    return counts


def describe(values: Mapping[str, float]) -> str:
    """Returns the baselines as one line."""
    return ", ".join(f"{name.removesuffix('_bits_per_byte')} {value:.3f}" for name, value in values.items())
