"""What simple models get on the validation text, in bits per byte: the figures a trained model is held against."""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gpt_jax.data.store import Split
from gpt_jax.data.tokenizer import Tokenizer

_BLOCK = 1 << 22  # tokens
_TRAIN_TOKENS = 1 << 28  # counted for the unigram model: more changes no digit
_XZ_BYTES = 8 << 20  # xz -9e takes a second or two per MB


def baselines(data: Any) -> dict[str, float]:
    """Returns {'xz_bits_per_byte', 'unigram_bits_per_byte'} of a prepared Data's validation text.

    xz is `xz -9e` on the validation text alone, documents joined by nothing (its first 8 MB). The unigram model is
    add-one token frequencies of the training text (its first 268M tokens), EOTs included, as for a trained model. {} if
    no text is held out; no xz figure where <unk> has lost the text.
    """
    train, valid = ([s for name, s in data.splits.items() if name.rpartition("/")[2] == w] for w in ("train", "valid"))
    size = sum(source.bytes for source in data.valid.values())
    if not valid or not size:
        return {}
    out = {}
    if data.tokenizer.lossless:
        out["xz_bits_per_byte"] = xz_bits_per_byte(documents(valid, data.tokenizer))
    counts = sum(token_counts(split, data.tokenizer.vocab_size, _TRAIN_TOKENS) for split in train)
    nll = unigram_nll(counts, sum(token_counts(split, data.tokenizer.vocab_size) for split in valid))
    out["unigram_bits_per_byte"] = nll / math.log(2) / size
    return out


def documents(splits: Sequence[Split], tokenizer: Tokenizer) -> Iterable[bytes]:
    """Yields the text of every document of the splits, as bytes."""
    for split in splits:
        ends = np.append(np.asarray(split.starts[1:], np.int64), split.num_tokens + int(split.starts[0]))
        for start, end in zip(split.starts.tolist(), ends.tolist(), strict=True):
            yield b"".join(map(tokenizer.token_bytes, split.read(start, end - start).tolist()))


def xz_bits_per_byte(texts: Iterable[bytes], limit: int = _XZ_BYTES) -> float:
    """Returns the bits that xz -9e needs per byte of the texts (those that begin within the first `limit` bytes)."""
    parts, size = [], 0
    for text in texts:
        parts.append(text)
        size += len(text)
        if size >= limit:
            break
    # The preset's dictionary of 64 MB takes 600 MB of memory; one as large as the text finds the same matches.
    dictionary = min(64 << 20, 1 << max(12, (size - 1).bit_length()))
    xz = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}
    return len(lzma.compress(b"".join(parts), filters=[xz])) * 8 / size


def token_counts(split: Split, vocab_size: int, limit: int | None = None) -> np.ndarray:
    """Returns how often each token occurs in (the first `limit` tokens of) a split, int64 [vocab_size]."""
    counts = np.zeros(vocab_size, np.int64)
    for at in range(0, min(split.num_tokens, limit or split.num_tokens), _BLOCK):
        counts += np.bincount(split.tokens[at : at + _BLOCK], minlength=vocab_size)
    return counts


def unigram_nll(train: np.ndarray, valid: np.ndarray) -> float:
    """Returns the summed loss, in nats, of tokens counted in `valid` under add-one frequencies of `train` [V]."""
    log_p = np.log(train + 1.0) - math.log(train.sum() + len(train))
    return float(-(valid * log_p).sum())


def describe(values: dict[str, float]) -> str:
    """Returns the baselines as one line: 'xz 2.512, unigram 2.635'."""
    return ", ".join(f"{name.removesuffix('_bits_per_byte')} {value:.3f}" for name, value in values.items())
