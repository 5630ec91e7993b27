"""Truncating a vocabulary to its k most frequent tokens, and what that costs."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpt_jax.data.tokenizer import Tokenizer, load_tokenizer, most_frequent
from gpt_jax.errors import UserError, choose


class TruncatedTokenizer(Tokenizer):
    """Another tokenizer with fewer tokens: one that was cut is spelled in bytes, or becomes <unk>.

    Args:
      inner: the whole tokenizer.
      kept: ids of `inner` that stay, in ascending order; new ids are their ranks.
      specials: names of the special tokens.
      unknown: 'bytes' (single-byte tokens are added where `kept` has none) or 'unk'.
      oov_types: distinct tokens of the corpus that were cut (for `unk_nats`).
    """

    kind = "truncated"

    def __init__(
        self,
        inner: Tokenizer,
        kept: Iterable[int],
        specials: Sequence[str] = (),
        unknown: str = "bytes",
        oov_types: int = 0,
    ):
        choose("data.tokenizer.unknown", unknown, ("bytes", "unk"))
        if not inner.lossless:
            raise UserError(f"only a lossless tokenizer can be truncated, and {inner.kind!r} is not.")
        self.inner, self.kept = inner, sorted({int(i) for i in kept})
        self.unknown, self.oov_types = unknown, oov_types
        size = len(self.kept)
        self._spelling = [inner.token_bytes(i) for i in self.kept]
        if unknown == "bytes":
            have = {b: i for i, b in enumerate(self._spelling) if len(b) == 1}
            missing = [bytes([b]) for b in range(256) if bytes([b]) not in have]
            have |= {b: size + i for i, b in enumerate(missing)}
            self._spelling += missing
            self._byte_ids = np.array([have[bytes([b])] for b in range(256)], np.int32)
        else:
            self._spelling.append("\N{REPLACEMENT CHARACTER}".encode())
        super().__init__(len(self._spelling), specials)
        if unknown == "unk":
            self.unk, self.unk_nats = size, math.log(max(1, oov_types))
        self._table = np.full(inner.vocab_size, -1, np.int32)
        self._table[self.kept] = np.arange(size, dtype=np.int32)

    def _encode(self, text: str) -> np.ndarray:
        old = self.inner.encode(text)
        ids = self._table[old]
        missing = ids < 0
        if not missing.any():
            return ids
        if self.unknown == "unk":
            return np.where(missing, np.int32(self.unk), ids)
        lengths = np.where(missing, self.inner.byte_lengths[old], 1)
        out = np.repeat(ids, lengths)
        spelled = b"".join(self.inner.token_bytes(int(i)) for i in old[missing])
        out[out < 0] = self._byte_ids[np.frombuffer(spelled, np.uint8)]
        return out

    def _ordinary_bytes(self) -> list[bytes]:
        return list(self._spelling)

    def fallback_ids(self) -> list[int]:
        """Every single byte: one that is kept also spells, and the two uses cannot be told apart by their id."""
        return [i for i, b in enumerate(self._spelling) if len(b) == 1] if self.unk is None else [self.unk]

    def _config(self):
        return {"kept": self.kept, "unknown": self.unknown, "oov_types": self.oov_types, "inner": self.inner.hash}

    def save(self, folder):
        super().save(folder)
        self.inner.save(pathlib.Path(folder) / "inner")

    @classmethod
    def _load(cls, config, folder):
        inner = load_tokenizer(folder / "inner")
        return cls(inner, config["kept"], config["specials"], config["unknown"], config["oov_types"])


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Returns how often each token occurs in the texts, int64 [vocab_size]."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for text in texts:
        counts += np.bincount(tokenizer.encode(text), minlength=tokenizer.vocab_size)
    return counts


def truncate(
    tokenizer: Tokenizer, counts: np.ndarray, k: int, specials: Sequence[str] = (), unknown: str = "bytes"
) -> TruncatedTokenizer:
    """Returns `tokenizer` cut to its k most frequent tokens (ties: smaller id first).

    Args:
      tokenizer: a lossless tokenizer.
      counts: occurrences of each token in the training text [vocab_size].
      k: tokens kept; k >= the number of tokens keeps all.
      specials, unknown: as TruncatedTokenizer.
    """
    ordinary = set(range(tokenizer.ordinary)) - set(tokenizer.specials.values())
    kept = most_frequent({i: int(counts[i]) for i in ordinary}, k)
    cut = ordinary - set(kept)
    return TruncatedTokenizer(tokenizer, kept, specials, unknown, sum(1 for i in cut if counts[i]))


def coverage(tokenizer: Tokenizer, texts: Iterable[str], ks: Sequence[int] = ()) -> dict[str, Any]:
    """Reports how a vocabulary covers texts.

    Returns:
      tokens, bytes, bytes_per_token; used (distinct tokens that occur); covered (part of the text's bytes that is
      neither spelled byte by byte (`Tokenizer.fallback_ids`) nor <unk>); and 'top': {k: part of the tokens that the k
      most frequent make up} for each k in `ks`.
    """
    counts, size = np.zeros(tokenizer.vocab_size, np.int64), 0
    for text in texts:
        counts += np.bincount(tokenizer.encode(text), minlength=tokenizer.vocab_size)
        size += len(text.encode("utf-8"))
    return coverage_of_counts(tokenizer, counts, size, ks)


def coverage_of_counts(tokenizer: Tokenizer, counts: np.ndarray, size: int, ks: Sequence[int] = ()) -> dict[str, Any]:
    """The same from counts [vocab_size] (specials may be counted; they are left out) and the text's bytes."""
    ordinary = np.array(counts, np.int64)
    ordinary[list(tokenizer.specials.values())] = 0
    if tokenizer.unk is None:
        spelled = int(ordinary[tokenizer.fallback_ids()].sum())
    else:
        spelled = size - _known_bytes(tokenizer, ordinary)
    total, ranked = int(ordinary.sum()), np.sort(ordinary)[::-1].cumsum()
    report = {
        "tokens": total,
        "bytes": size,
        "bytes_per_token": round(size / max(1, total), 4),
        "used": int((ordinary > 0).sum()),
        "covered": round(1 - spelled / max(1, size), 6),
    }
    if ks:
        report["top"] = {int(k): round(int(ranked[min(k, len(ranked)) - 1]) / max(1, total), 6) for k in ks}
    if tokenizer.unk is not None:
        report["unk"] = int(ordinary[tokenizer.unk])
        report["unk_nats"] = tokenizer.unk_nats
    return report


def _known_bytes(tokenizer: Tokenizer, counts: Mapping[int, int]) -> int:
    lengths = np.array(tokenizer.byte_lengths, np.int64)
    lengths[tokenizer.unk] = 0
    return int((lengths * counts).sum())
