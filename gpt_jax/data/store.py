"""The token store: per split a ragged array of tokens on disk, with document offsets and a manifest.

    STORE/manifest.json             tokenizer hash, corpus fingerprint, dtype, counts per split, checksums
    STORE/{train,valid}.tokens      little-endian uint16 or uint32; every document begins with its EOT, if there is one
    STORE/{train,valid}.starts      little-endian uint64: where each document begins in .tokens
    STORE/{train,valid}.bytes       little-endian uint64: bytes of the text of each document
    STORE/tokenizer/                the tokenizer itself

Arrays are reached only through `open_array`, so that another driver (an object store) is one function.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from gpt_jax.data.cache import build_folder, cache_root, file_sha256, remembered
from gpt_jax.data.tokenizer import Tokenizer, load_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.remote import Remote, fetch_file, is_url

MANIFEST = "manifest.json"
_VERIFIED = 64 << 20  # bytes of a store whose checksums are compared whenever it is opened: a tenth of a second
FORMAT = 1
SPLITS = ("train", "valid")
ARRAYS = {"tokens": None, "starts": "<u8", "bytes": "<u8"}  # dtype of tokens: the manifest's


class Split:
    """The tokens of a split, as one stream: EOT document EOT document ...

    Args:
      tokens: integers [num_tokens], read lazily.
      starts: where documents begin, ascending [num_documents]; or a function that finds them, called when needed.
      num_bytes: bytes of the original text.
      eot: the id that begins every document, or None.
      num_documents: if known without `starts`.
      sha256: of the tokens, in hex, where they have no manifest.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        starts: np.ndarray | Callable[[], np.ndarray],
        num_bytes: int,
        eot: int | None,
        num_documents: int | None = None,
        sha256: str = "",
    ):
        self.tokens, self.num_bytes, self.eot, self.sha256 = tokens, num_bytes, eot, sha256
        self._starts, self._num_documents = starts, num_documents

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Where documents begin, ascending [num_documents]."""
        return self._starts() if callable(self._starts) else self._starts

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.starts) if self._num_documents is None else self._num_documents

    def read(self, start: int, count: int) -> np.ndarray:
        """Returns `count` tokens from `start` on, int32, going round at the end of the stream."""
        size = len(self.tokens)
        out, at = np.empty(count, np.int32), 0
        while at < count:
            first = (start + at) % size
            part = self.tokens[first : first + count - at]
            out[at : at + len(part)] = part
            at += len(part)
        return out

    def begins(self, start: int, count: int) -> np.ndarray:
        """Returns which of those positions begin a document, bool [count]."""
        size = len(self.tokens)
        out, at = np.zeros(count, bool), 0
        while at < count:
            first = (start + at) % size
            length = min(size - first, count - at)
            low, high = np.searchsorted(self.starts, (first, first + length))
            out[np.asarray(self.starts[low:high], np.int64) - first + at] = True
            at += length
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """An opened token store."""

    path: pathlib.Path
    manifest: dict[str, Any]

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that hold tokens."""
        return {name: self.split(name) for name in SPLITS if self.manifest["splits"][name]["tokens"]}

    @functools.cache  # noqa: B019 (a store lives as long as its run)
    def split(self, name: str) -> Split:
        dtypes = ARRAYS | {"tokens": self.manifest["dtype"]}
        entry = self.manifest["splits"][name]
        tokens, starts = (
            open_array(self.path / f"{name}.{array}", dtypes[array], entry[size])
            for array, size in (("tokens", "tokens"), ("starts", "documents"))
        )
        return Split(tokens, starts, entry["bytes"], self.manifest["eot"])

    def document_bytes(self, name: str) -> np.ndarray:
        """Bytes of the text of each document of a split, uint64 [num_documents]."""
        return open_array(self.path / f"{name}.bytes", "<u8", self.manifest["splits"][name]["documents"])

    def load_tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path / "tokenizer")


def open_array(path: pathlib.Path, dtype: str, size: int) -> np.ndarray:
    """Returns an array of `size` items at `path`, read lazily; raises UserError if its length is another."""
    try:
        have = path.stat().st_size
    except OSError:
        raise UserError(
            f"the token store is damaged: {path} is missing; delete {path.parent} to build it again."
        ) from None
    wanted = size * np.dtype(dtype).itemsize
    if have != wanted:
        raise UserError(
            f"the token store is damaged: {path} has {have} bytes instead of {wanted}; delete {path.parent} to build "
            "it again."
        )
    return np.memmap(path, dtype, "r", shape=(size,)) if size else np.empty(0, dtype)


def open_store(path: str | pathlib.Path, tokenizer: Tokenizer | None = None, verify: bool | None = None) -> Store:
    """Opens a token store.

    Args:
      path: its folder, or its URL in an object store, of which a copy is made in the cache.
      tokenizer: if given, it must be the one that made the store.
      verify: also compare every file's checksum (reads the whole store). None: of a store of at most 64 MB.

    Raises:
      UserError: no store there, another tokenizer's, or damaged (naming the file).
    """
    path = pathlib.Path(fetch_store(str(path), cache_root(), print) if is_url(path) else path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version, files = manifest["format"], manifest["files"]
    except FileNotFoundError:
        raise UserError(f"no token store in {str(path)!r} ({MANIFEST} is missing).") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the token store is damaged: {path / MANIFEST} ({error}); delete {path}.") from None
    if version != FORMAT:
        raise UserError(f"the token store {path} has format {version}; this version reads {FORMAT}; delete it.")
    if tokenizer is not None and tokenizer.hash != manifest["tokenizer"]:
        raise UserError(
            f"the token store {path} was made with another tokenizer ({manifest['tokenizer_kind']}, "
            f"{manifest['tokenizer'][:12]}), not with this one ({tokenizer.kind}, {tokenizer.hash[:12]})."
        )
    if verify is None:
        verify = sum(entry["size"] for entry in files.values()) <= _VERIFIED
    for name, entry in files.items():
        file = path / name
        open_array(file, "u1", entry["size"])
        if verify and file_sha256(file) != entry["sha256"]:
            raise UserError(f"the token store is damaged: the checksum of {file} differs; delete {path}.")
    return Store(path, manifest)


def fetch_store(url: str, root: pathlib.Path, log: Callable[[str], None] | None = None, context: Any = None) -> str:
    """Returns a local copy of a token store in an object store, kept in `root` by its manifest: its files are mapped.

    Raises:
      UserError: no store there, or a file of it is missing or damaged.
    """
    remote = Remote(url, context)
    text = remote.read(MANIFEST)
    if text is None:
        raise UserError(f"no token store at {url!r} ({MANIFEST} is missing).")
    place = root / "stores" / f"remote-{hashlib.sha256(text).hexdigest()[:16]}"

    def build(new: pathlib.Path) -> None:
        try:
            files = json.loads(text)["files"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"the token store at {url!r} is damaged: {MANIFEST} ({error}).") from None
        for name, entry in files.items():
            if ".." in pathlib.PurePosixPath(name).parts or name.startswith("/"):
                raise UserError(f"the token store at {url!r} is damaged: {MANIFEST} names {name!r}.")
            remote.download(name, new / name, entry["size"])
            if file_sha256(new / name) != entry["sha256"]:
                raise UserError(f"the token store at {url!r} is damaged: the checksum of {name} differs.")
        (new / MANIFEST).write_bytes(text)

    if not place.is_dir() and log:
        log(f"copying the token store {url} to {place}, where its files can be mapped")
    return str(build_folder(place, build, f"a copy of {url}", log))


def is_store(path: str) -> bool:
    """Tells whether a data path is a token store's folder, perhaps in an object store."""
    if is_url(path):
        return Remote(path).read(MANIFEST) is not None
    return (pathlib.Path(path) / MANIFEST).is_file()


def is_token_file(path: str) -> bool:
    """Tells whether a data path is a file of raw uint16 tokens, as nanoGPT writes them."""
    return path.strip().endswith(".bin")


_BLOCK = 1 << 24  # tokens read at a time


def open_token_file(path: str | pathlib.Path, tokenizer: Tokenizer, memo: pathlib.Path | None = None) -> Split:
    """Reads nanoGPT's .bin (uint16 tokens, an EOT after each document) in place.

    Its stream is the same as a store's, only begun elsewhere in the circle. The number of bytes is that of the tokens.

    Args:
      path: the file.
      tokenizer: that made it.
      memo: folder where counts and hash are remembered, as `remembered`; a large file takes a while to read.

    Raises:
      UserError: missing, empty, or holding an id that the tokenizer has not.
    """
    path = fetch_file(str(path), cache_root(), print) if is_url(path) else pathlib.Path(path)
    try:
        stat = path.stat()
    except OSError:
        raise UserError(f"data path {str(path)!r}: no such file.") from None
    if stat.st_size == 0 or stat.st_size % 2:
        raise UserError(f"{path} has {stat.st_size} bytes: not a file of uint16 tokens.")
    tokens = np.memmap(path, "<u2", "r")
    key = f"counts and sha256 of tokens {path.resolve()} {stat.st_size} {stat.st_mtime_ns} {tokenizer.hash}"
    found = remembered(memo, key, lambda: _count(tokens, tokenizer))
    if found["largest"] >= tokenizer.vocab_size:
        raise UserError(
            f"{path} holds token {found['largest']}, but the tokenizer ({tokenizer.kind}) has "
            f"{tokenizer.vocab_size}: another one made it; set data.tokenizer."
        )
    if not found["eots"]:
        return Split(tokens, np.zeros(1, "<u8"), found["bytes"], tokenizer.eot, sha256=found["sha256"])
    starts = functools.partial(_positions, tokens, tokenizer.eot)
    return Split(tokens, starts, found["bytes"], tokenizer.eot, found["eots"], found["sha256"])


def _count(tokens: np.ndarray, tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the largest id of a token file, the bytes its tokens stand for, its EOTs and the tokens' SHA-256."""
    counts, digest = np.zeros(1 << 16, np.int64), hashlib.sha256()
    for at in range(0, len(tokens), _BLOCK):
        counts += np.bincount(tokens[at : at + _BLOCK], minlength=len(counts))
        digest.update(tokens[at : at + _BLOCK])
    lengths = tokenizer.byte_lengths[: len(counts)].astype(np.int64)
    eots = 0 if tokenizer.eot is None or tokenizer.eot >= len(counts) else int(counts[tokenizer.eot])
    return {
        "largest": int(np.flatnonzero(counts)[-1]),
        "bytes": int((counts[: len(lengths)] * lengths).sum()),
        "eots": eots,
        "sha256": digest.hexdigest(),
    }


def _positions(tokens: np.ndarray, token: int) -> np.ndarray:
    """Returns where a token stands, uint64."""
    blocks = range(0, len(tokens), _BLOCK)
    return np.concatenate([np.flatnonzero(tokens[at : at + _BLOCK] == token) + at for at in blocks]).astype("<u8")
