"""GPT-2's byte-level BPE from its two files, and any Hugging Face tokenizer.json, through the `tokenizers` library."""

from __future__ import annotations

import functools
import json
import lzma
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpt_jax.data.tokenizer import StreamDecoder, Tokenizer
from gpt_jax.errors import UserError

# GPT-2's pre-tokenizer splits on \p{L}, \p{N} and \s, which Python's `re` has not. On text made only of the characters
# below, whose classes no Unicode version disputes (a test asks the library about each), it is this pattern exactly, and
# a dictionary from word to ids is about five times as fast as the library, which gets everything else.
_LETTERS = "A-Za-zÀ-ÖØ-öø-ɏΑ-Ρά-ώА-яЁё一-龥ぁ-ゖァ-ヺ"
_OTHERS = "!-/:-@\\[-`{-~¡-©«-¬®-±´¶-¸»¿×÷‐-‧‰-⁞、-〃〈-】，．：；？！（）"
_SPACES = "\\t-\\r "
_UNSAFE = re.compile(f"[^{_LETTERS}0-9{_OTHERS}{_SPACES}]")
_WORDS = re.compile(
    f"'s|'t|'re|'ve|'m|'ll|'d| ?[{_LETTERS}]+| ?[0-9]+| ?[{_OTHERS}]+|[{_SPACES}]+(?![^{_SPACES}])|[{_SPACES}]+"
)
# No token of the pattern spans this place, and none on its left looks beyond it.
_CUT = re.compile(r"(?<=\S\n)(?=\S)")
_SEGMENT = 1 << 16  # characters handled at a time
_CACHED_WORDS = 1 << 17


@functools.cache
def byte_characters() -> dict[str, int]:
    """Returns GPT-2's map from printable character to byte (Radford et al. 2019, encoder.py: bytes_to_unicode)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE.

    Args:
      vocabulary: token (in GPT-2's printable characters) -> id, ids 0 .. n-1.
      merges: the pairs, in order.
      specials: names of the special tokens; `eot` is the vocabulary's own <|endoftext|> if it has one.
    """

    kind = "gpt2"

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], specials: Sequence[str] = ()):
        import tokenizers

        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise ValueError("the ids of encoder.json are not 0 .. n-1")
        own = {"eot": vocabulary["<|endoftext|>"]} if "<|endoftext|>" in vocabulary else {}
        super().__init__(len(vocabulary), specials, own)
        self._vocabulary, self._merges = dict(vocabulary), [tuple(m) for m in merges]
        self._library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=self._vocabulary, merges=self._merges))
        self._library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._words = _WordCache(self._library)

    def _encode(self, text: str) -> np.ndarray:
        out = []
        for segment in _segments(text, _SEGMENT):
            if not _UNSAFE.search(segment):
                out.append(self._fast(segment))
            else:
                out.extend(
                    self._fast(line) if not _UNSAFE.search(line) else self._slow(line) for line in _segments(segment, 1)
                )
        return np.frombuffer(b"".join(out), "<i4").astype(np.int32, copy=False)

    def _fast(self, text: str) -> bytes:
        if len(self._words) > _CACHED_WORDS:
            self._words.clear()
        return b"".join(map(self._words.__getitem__, _WORDS.findall(text)))

    def _slow(self, text: str) -> bytes:
        return np.array(self._library.encode(text, add_special_tokens=False).ids, "<i4").tobytes()

    def _ordinary_bytes(self) -> list[bytes]:
        table, characters = [b""] * self.ordinary, byte_characters()
        for token, i in self._vocabulary.items():
            table[i] = bytes(characters[c] for c in token) if all(c in characters for c in token) else token.encode()
        return table

    def _files(self):
        merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in self._merges)
        ordered = dict(sorted(self._vocabulary.items(), key=lambda kv: kv[1]))
        return {"encoder.json": json.dumps(ordered).encode(), "vocab.bpe": merges.encode()}

    @classmethod
    def _load(cls, config, folder):
        return load_gpt2(folder, config["specials"])


class _WordCache(dict):
    """Word -> its ids as little-endian int32 bytes, filled by the library."""

    def __init__(self, library: Any):
        super().__init__()
        self._library = library

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self._library.encode(word, add_special_tokens=False).ids, "<i4").tobytes()
        self[word] = ids
        return ids


def _segments(text: str, size: int) -> Iterator[str]:
    """Yields pieces of a text of at least `size` characters, cut where GPT-2's pattern cannot see across."""
    start = 0
    while start < len(text):
        match = _CUT.search(text, start + size)
        end = match.start() if match else len(text)
        yield text[start:end]
        start = end


def load_gpt2(folder: str | pathlib.Path, specials: Sequence[str] = ()) -> GPT2Tokenizer:
    """Reads encoder.json and vocab.bpe (or vocab.json and merges.txt), plain or .xz, from a folder.

    Raises:
      UserError: a file is missing or is not what its name says.
    """
    folder = pathlib.Path(folder)
    if folder.is_file():
        folder = folder.parent
    encoder, merges = _find(folder, "encoder.json", "vocab.json"), _find(folder, "vocab.bpe", "merges.txt")
    try:
        vocabulary = json.loads(_read(encoder))
        lines = _read(merges).split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        if not isinstance(vocabulary, dict) or any(len(p) != 2 for p in pairs):
            raise ValueError("wrong layout")
        return GPT2Tokenizer(vocabulary, pairs, specials)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{encoder} and {merges} are not a byte-level BPE ({' '.join(str(error).split())}).") from None


def _find(folder: pathlib.Path, *names: str) -> pathlib.Path:
    for name in names:
        for path in (folder / name, folder / f"{name}.xz"):
            if path.is_file():
                return path
    raise UserError(f"no {' or '.join(names)} (plain or .xz) in {str(folder)!r}; set data.tokenizer.path.")


def _read(path: pathlib.Path) -> str:
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        return file.read()


_BEGIN_TOKENS = ("<|begin_of_text|>", "<s>", "<bos>")
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|eot|>", "</s>", "<eos>", "[SEP]")


class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer.json. Byte-level ones are lossless; for others decoding is the library's.

    Args:
      text: content of tokenizer.json.
      specials: names of the special tokens; `eot` is the vocabulary's own end token if it has a known one.
      end: the vocabulary's end token, where it is none of the known ones.
    """

    kind = "hf"

    def __init__(self, text: str, specials: Sequence[str] = (), end: str = ""):
        import tokenizers

        self._text, self._end = text, end
        try:
            self._library = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"not a tokenizer.json: {' '.join(str(error).split())[:200]}") from None
        self._library.encode_special_tokens = True  # '<|endoftext|>' in a text is text
        self._library.no_padding()
        self._library.no_truncation()
        end = next((t for t in (end, *_END_TOKENS) if t and self._library.token_to_id(t) is not None), None)
        own = {"eot": self._library.token_to_id(end)} if end else {}
        vocabulary = self._library.get_vocab()
        if not vocabulary:
            raise UserError("not a tokenizer.json: its vocabulary is empty.")
        super().__init__(max(vocabulary.values()) + 1, specials, own)
        decoder = json.dumps(json.loads(text).get("decoder"))
        self._style = "bytes" if '"ByteLevel"' in decoder else "fallback" if '"ByteFallback"' in decoder else "other"

    @property
    def lossless(self) -> bool:
        return self._style == "bytes"

    @property
    def begin(self) -> list[int]:
        found = [i for t in _BEGIN_TOKENS if (i := self._library.token_to_id(t)) is not None]
        return found[:1] or super().begin

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self._library.encode(text, add_special_tokens=False).ids, np.int32)

    def _ordinary_bytes(self) -> list[bytes]:
        characters, table = byte_characters(), []
        added = {token.content for token in self._library.get_added_tokens_decoder().values()}
        for i in range(self.ordinary):
            token = self._library.id_to_token(i) or ""
            if self._style == "bytes" and token not in added and all(c in characters for c in token):
                table.append(bytes(characters[c] for c in token))
            elif self._style == "fallback" and re.fullmatch("<0x[0-9A-F]{2}>", token):
                table.append(bytes([int(token[3:5], 16)]))
            elif self._style == "other" and token not in added:
                table.append(token.removeprefix("##").encode())
            else:
                table.append(token.replace("\u2581", " ").encode())
        return table

    def decode(self, ids, specials: str = "skip") -> str:
        if self._style == "bytes":
            return super().decode(ids, specials)
        return self._library.decode([int(i) for i in ids if i < self.ordinary], skip_special_tokens=specials == "skip")

    def stream(self, specials: str = "skip", before: Sequence[int] = ()) -> StreamDecoder:
        return _LibraryDecoder(self, specials, before) if self._style == "other" else super().stream(specials)

    def _config(self):
        return {"end": self._end} if self._end else {}

    def _files(self):
        return {"tokenizer.json": self._text.encode()}

    @classmethod
    def _load(cls, config, folder):
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return cls(text, config["specials"], config.get("end", ""))


class _LibraryDecoder(StreamDecoder):
    """Hands out what a token adds to the text of all ids so far: a word's piece alone does not tell its space."""

    def __init__(self, tokenizer: Tokenizer, specials: str = "skip", before: Sequence[int] = ()):
        super().__init__(tokenizer, specials)
        self._ids = [int(i) for i in before]
        self._shown = len(self._whole())

    def _whole(self) -> str:
        return self._tokenizer.decode(self._ids, self._specials)

    def push(self, token: int) -> str:
        self._ids.append(int(token))
        new = self._whole().rstrip("\ufffd")[self._shown :]
        self._shown += len(new)
        return new

    def flush(self) -> str:
        text, self._ids, shown, self._shown = self._whole(), [], self._shown, 0
        return text[shown:]
