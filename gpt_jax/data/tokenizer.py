"""The tokenizer interface, its folder format, and the two kinds that need no library: characters and bytes.

Every tokenizer is lossless where its kind allows it: decode(encode(text)) == text for any UTF-8 text, and text never
produces a special token. Ids are the ordinary vocabulary first, then the specials that it has not already.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import importlib
import json
import math
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from gpt_jax.errors import UserError, choose
from gpt_jax.files import atomic_write

CONFIG_FILE = "tokenizer_config.json"
FORMAT = 1


class Tokenizer:
    """Base of all kinds; a kind defines `_encode`, `_ordinary_bytes`, `_files` and `_load`.

    Args:
      ordinary: number of ordinary tokens, ids [0, ordinary).
      specials: names of the special tokens.
      own: specials that the ordinary vocabulary has already, name -> id.

    Attributes:
      vocab_size: ordinary tokens + specials.
      specials: name -> id.
      eot: id of the end-of-text token, or None.
      unk: id of <unk>, or None: then the tokenizer is lossless.
      unk_nats: log of the number of types that <unk> stands for; added to the loss of each <unk> before two
        vocabularies are compared, else truncation makes text look easy.
    """

    kind: ClassVar[str] = ""

    def __init__(self, ordinary: int, specials: Sequence[str] = (), own: Mapping[str, int] | None = None):
        own = own or {}
        new = [name for name in specials if name not in own]
        if len(set(specials)) != len(specials):
            raise UserError(f"data.tokenizer.specials repeats a name: {', '.join(specials)}.")
        self.ordinary = ordinary
        self.specials = {name: own[name] if name in own else ordinary + new.index(name) for name in specials}
        self.vocab_size = ordinary + len(new)
        self.eot = self.specials.get("eot")
        self.unk: int | None = None
        self.unk_nats = 0.0
        self._special_names = {i: name for name, i in self.specials.items()}

    # -- what a kind defines ------------------------------------------------------------------------------------

    def _encode(self, text: str) -> np.ndarray:
        raise NotImplementedError

    def _ordinary_bytes(self) -> list[bytes]:
        """Returns the bytes of every ordinary token, by id."""
        raise NotImplementedError

    def _config(self) -> dict[str, Any]:
        """Returns what `_load` needs beside the specials, JSON-able."""
        return {}

    def _files(self) -> dict[str, bytes]:
        """Returns the model's files, name -> content."""
        return {}

    @classmethod
    def _load(cls, config: Mapping[str, Any], folder: pathlib.Path) -> Tokenizer:
        raise NotImplementedError

    # -- what everybody uses ------------------------------------------------------------------------------------

    @property
    def lossless(self) -> bool:
        return self.unk is None

    @property
    def begin(self) -> list[int]:
        """What a model reads before the first token of a text that it continues: as in training, the EOT."""
        return [] if self.eot is None else [self.eot]

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, int32 [n]; raises UserError if it is not valid Unicode."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"the text holds half a surrogate pair at character {error.start}.") from None
        return self._encode(text)

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        table = self._ordinary_bytes() + [b""] * (self.vocab_size - self.ordinary)
        for i in self._special_names:
            table[i] = b""
        return table

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each token stands for, int32 [vocab_size]; specials 0."""
        return np.array([len(b) for b in self._bytes], np.int32)

    def fallback_ids(self) -> list[int]:
        """Returns the tokens that spell what the vocabulary has no token for: here, parts of a character."""
        return [i for i, b in enumerate(self._bytes) if len(b) == 1 and b[0] >= 0x80]

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of text that a token stands for; b'' for a special."""
        return self._bytes[token]

    def _shown(self, token: int, specials: str) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise UserError(f"token {token} is not in the vocabulary of {self.vocab_size}.")
        if specials == "show" and token in self._special_names:
            return f"<|{self._special_names[token]}|>".encode()
        return self._bytes[token]

    def decode(self, ids: Iterable[int], specials: str = "skip") -> str:
        """Returns the text of ids, always valid UTF-8 (broken sequences become U+FFFD).

        Args:
          ids: token ids.
          specials: 'skip' leaves special tokens out, 'show' writes <|name|>.
        """
        return b"".join([self._shown(int(i), specials) for i in ids]).decode("utf-8", errors="replace")

    def stream(self, specials: str = "skip", before: Sequence[int] = ()) -> StreamDecoder:
        """Returns a decoder that takes one token at a time; `before`: ids of the text that they continue."""
        return StreamDecoder(self, specials)

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of everything that decides the ids, in hex."""
        digest = hashlib.sha256(self._description().encode())
        for name, data in sorted(self._files().items()):
            digest.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
        return digest.hexdigest()

    def _description(self) -> str:
        config = {"format": FORMAT, "kind": self.kind, "specials": list(self.specials), **self._config()}
        return json.dumps(config, indent=1, sort_keys=True)

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes the tokenizer as plain files that `load_tokenizer` reads."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self._files().items():
            atomic_write(folder / name, data)
        atomic_write(folder / CONFIG_FILE, self._description() + "\n")


class StreamDecoder:
    """Turns tokens into text one by one; a character is handed out when its last byte has come.

    The pieces joined are `decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, specials: str = "skip"):
        self._tokenizer, self._specials = tokenizer, specials
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Returns the text that this token completes, perhaps ''."""
        return self._decoder.decode(self._tokenizer._shown(int(token), self._specials))

    def flush(self) -> str:
        """Returns U+FFFD for a character left unfinished, else ''."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8: 256 ordinary tokens."""

    kind = "byte"

    def __init__(self, specials: Sequence[str] = ()):
        super().__init__(256, specials)

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def _ordinary_bytes(self) -> list[bytes]:
        return [bytes([i]) for i in range(256)]

    @classmethod
    def _load(cls, config, folder):
        return cls(config["specials"])


class CharTokenizer(Tokenizer):
    """One token per character of a fixed alphabet.

    Args:
      alphabet: the characters; ids in the order of the code points.
      specials: names of the special tokens.
      unknown: what another character becomes: 'bytes' (its UTF-8 bytes, 256 tokens after the alphabet), 'unk' (one
        <unk> token) or 'error' (a UserError; no further token).
      oov_types: distinct characters of the corpus outside the alphabet (for `unk_nats`).
    """

    kind = "char"

    def __init__(
        self, alphabet: Iterable[str], specials: Sequence[str] = (), unknown: str = "bytes", oov_types: int = 0
    ):
        choose("data.tokenizer.unknown", unknown, ("bytes", "unk", "error"))
        self.alphabet = sorted(set(alphabet))
        size = len(self.alphabet)
        super().__init__(size + {"bytes": 256, "unk": 1, "error": 0}[unknown], specials)
        self.unknown, self.oov_types = unknown, oov_types
        if unknown == "unk":
            self.unk, self.unk_nats = size, math.log(max(1, oov_types))
        self._table = np.full(0x110000, -1, np.int32)
        self._table[[ord(c) for c in self.alphabet]] = np.arange(size, dtype=np.int32)

    def _encode(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = self._table[points]
        missing = ids < 0
        if not missing.any():
            return ids
        if self.unknown == "unk":
            return np.where(missing, np.int32(self.unk), ids)
        if self.unknown == "error":
            raise UserError(
                f"character {chr(points[missing][0])!r} is not in the vocabulary of {len(self.alphabet)} characters; "
                "data.tokenizer.unknown='bytes' would spell it."
            )
        lengths = np.ones(len(ids), np.int64)
        lengths[missing] = 1 + (points[missing] >= 0x80) + (points[missing] >= 0x800) + (points[missing] >= 0x10000)
        out = np.repeat(ids, lengths)
        spelled = "".join(map(chr, points[missing])).encode("utf-8")
        out[out < 0] = np.frombuffer(spelled, np.uint8).astype(np.int32) + len(self.alphabet)
        return out

    def _ordinary_bytes(self) -> list[bytes]:
        rest = {"bytes": [bytes([i]) for i in range(256)], "unk": ["\N{REPLACEMENT CHARACTER}".encode()], "error": []}
        return [c.encode("utf-8") for c in self.alphabet] + rest[self.unknown]

    def fallback_ids(self) -> list[int]:
        return list(range(len(self.alphabet), self.ordinary))

    def _config(self):
        return {"alphabet": "".join(self.alphabet), "unknown": self.unknown, "oov_types": self.oov_types}

    @classmethod
    def _load(cls, config, folder):
        return cls(config["alphabet"], config["specials"], config["unknown"], config["oov_types"])


def most_frequent(counts: Mapping[Any, int], k: int) -> list[Any]:
    """Returns the k most frequent keys (0: all), ties broken by the smaller key."""
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    return ranked[:k] if k else ranked


def train_char(texts: Iterable[str], k: int, specials: Sequence[str], unknown: str) -> CharTokenizer:
    """Returns a CharTokenizer of the k most frequent characters of the texts (0: of all)."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    kept = most_frequent(counts, k)
    return CharTokenizer(kept, specials, unknown, oov_types=len(counts) - len(kept))


_KINDS = {
    "byte": "gpt_jax.data.tokenizer:ByteTokenizer",
    "char": "gpt_jax.data.tokenizer:CharTokenizer",
    "unigram": "gpt_jax.data.sentencepieces:SentencePieceTokenizer",
    "bpe": "gpt_jax.data.sentencepieces:SentencePieceTokenizer",
    "gpt2": "gpt_jax.data.byte_level_bpe:GPT2Tokenizer",
    "hf": "gpt_jax.data.byte_level_bpe:HuggingFaceTokenizer",
    "ids": "gpt_jax.data.token_ids:IdsTokenizer",
    "truncated": "gpt_jax.data.vocabulary:TruncatedTokenizer",
}


def load_tokenizer(folder: str | pathlib.Path) -> Tokenizer:
    """Reads a tokenizer written by `Tokenizer.save`; raises UserError naming the folder if there is none."""
    folder = pathlib.Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        module, name = _KINDS[choose("the tokenizer's kind", config["kind"], _KINDS)].split(":")
        # Imported by name: a process that needs one kind does not load the libraries of the others.
        return getattr(importlib.import_module(module), name)._load(config, folder)
    except FileNotFoundError as error:
        raise UserError(f"no tokenizer in {str(folder)!r}: {pathlib.Path(error.filename).name} is missing.") from None
    except (ValueError, KeyError) as error:
        raise UserError(f"the tokenizer in {str(folder)!r} is damaged ({type(error).__name__}: {error}).") from None
