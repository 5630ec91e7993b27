"""Tokenizing documents, here or in another process: python -m gpt_jax.data.worker TOKENIZER DTYPE

A worker reads chunks of documents from stdin and writes their tokens to stdout until stdin ends, so it dies with the
process that started it. Being a program of its own, it neither imports nor re-runs that process's main module.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import struct
import subprocess
import sys
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from gpt_jax.data.tokenizer import Tokenizer, load_tokenizer
from gpt_jax.errors import UserError

_COUNT = struct.Struct("<Q")


def encode_chunk(tokenizer: Tokenizer, texts: Sequence[str], dtype: str) -> tuple[np.ndarray, bytes]:
    """Returns (tokens of each document with its EOT, int64 [n], all of them as bytes of `dtype`)."""
    first = np.array([] if tokenizer.eot is None else [tokenizer.eot], dtype)
    lengths, parts = [], []
    for text in texts:
        ids = tokenizer.encode(text)
        lengths.append(len(first) + len(ids))
        parts += [first.tobytes(), ids.astype(dtype).tobytes()]
    return np.array(lengths, "<i8"), b"".join(parts)


class Worker:
    """A process that tokenizes; `encode` is `encode_chunk`."""

    def __init__(self, tokenizer_folder: str, dtype: str):
        ours, paths = str(pathlib.Path(__file__).parents[2]), list(filter(None, sys.path))
        self._process = subprocess.Popen(
            # -P: the code of this package, not of a checkout that happens to be the current folder
            [sys.executable, "-P", "-m", "gpt_jax.data.worker", str(tokenizer_folder), dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONPATH": os.pathsep.join(paths if ours in paths else [ours, *paths]),
            },
        )

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, bytes]:
        data = [text.encode("utf-8") for text in texts]
        try:
            _send(self._process.stdin, np.array([len(d) for d in data], "<i8").tobytes())
            _send(self._process.stdin, b"".join(data))
            problem = _receive(self._process.stdout)
            if problem:
                raise UserError(problem.decode("utf-8"))
            return np.frombuffer(_receive(self._process.stdout), "<i8"), _receive(self._process.stdout)
        except (EOFError, BrokenPipeError):
            code = self._process.wait()
            raise RuntimeError(f"a tokenizing process ended with exit code {code}") from None

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _send(stream: BinaryIO, data: bytes) -> None:
    stream.write(_COUNT.pack(len(data)))
    stream.write(data)
    stream.flush()


def _receive(stream: BinaryIO) -> bytes:
    header = stream.read(_COUNT.size)
    if len(header) < _COUNT.size:
        raise EOFError
    (size,) = _COUNT.unpack(header)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def main(argv: Sequence[str]) -> int:
    folder, dtype = argv
    tokenizer = load_tokenizer(folder)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            sizes = np.frombuffer(_receive(source), "<i8")
            data = _receive(source)
        except EOFError:
            return 0
        ends = np.cumsum(sizes)
        texts = [data[end - size : end].decode("utf-8") for end, size in zip(ends, sizes, strict=True)]
        try:
            lengths, tokens = encode_chunk(tokenizer, texts, dtype)
        except UserError as error:
            _send(sink, str(error).encode("utf-8"))
            continue
        _send(sink, b"")
        _send(sink, lengths.tobytes())
        _send(sink, tokens)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
