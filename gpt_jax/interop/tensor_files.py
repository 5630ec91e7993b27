"""Safetensors files: read as memory-mapped views, written tensor by tensor. Nothing in them is ever executed.

    8 bytes, little endian: N      N bytes of JSON: {name: {dtype, shape, data_offsets: [from, to]}}      the data

A view is read where it is touched, so a shard of a transposed, stacked tensor costs the pages it lies on, whatever the
size of the file; and a file is written in any order, with no more in memory than the tensor at hand.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.files import atomic_write, explain_no_space

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_LARGEST_HEADER = 100_000_000
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


class Tensors(Mapping):
    """The tensors of a folder by name, each a read-only view of its file.

    Args:
      folder: with model.safetensors, or several files and their index.

    Raises:
      UserError: there are none (pickled weights are named and refused), or a file is damaged or missing.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = pathlib.Path(folder)
        self._views: dict[str, np.ndarray] = {}
        for path, wanted in self._files():
            views = read_file(path)
            if missing := [name for name in wanted or () if name not in views]:
                raise UserError(f"{path} has no tensor {missing[0]!r}, which {INDEX} says it has.")
            self._views |= views

    def _files(self) -> list[tuple[pathlib.Path, list[str] | None]]:
        if (self.folder / SINGLE).is_file():
            return [(self.folder / SINGLE, None)]
        index = self.folder / INDEX
        if index.is_file():
            try:
                places = json.loads(index.read_text())["weight_map"]
                files: dict[str, list[str]] = {}
                for name, file in places.items():
                    files.setdefault(pathlib.PurePath(file).name, []).append(name)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is no index of tensors ({type(error).__name__}: {error}).") from None
            return [(self.folder / file, names) for file, names in sorted(files.items())]
        found = sorted(self.folder.glob("*.safetensors"))
        if len(found) == 1:
            return [(found[0], None)]
        if found:
            raise UserError(f"{str(self.folder)!r} has {len(found)} safetensors files and no {INDEX}.")
        pickled = sorted(p.name for p in self.folder.iterdir() if p.suffix in _PICKLED)
        if pickled:
            raise UserError(
                f"{str(self.folder)!r} has its weights in {pickled[0]}, which could run code when it is opened, and is "
                "never loaded: save them as safetensors."
            )
        raise UserError(f"{str(self.folder)!r} has no weights: {SINGLE} is missing.")

    def __getitem__(self, name: str) -> np.ndarray:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


def read_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the tensors of a file as read-only memory-mapped views; raises UserError if it is damaged or missing."""
    path = pathlib.Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        data = np.memmap(path, np.uint8, "r", offset=8 + length, shape=(size - 8 - length,)) if header else None
        return {name: _view(data, name, entry) for name, entry in header.items()}
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}).") from None


def _view(data: np.ndarray, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    if entry["dtype"] not in _DTYPES:
        raise UserError(
            f"tensor {name!r} has dtype {entry['dtype']}, which is not supported (allowed: {', '.join(_DTYPES)})."
        )
    dtype, shape, (start, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not 0 <= start <= end <= len(data) or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} lies at {start} to {end} of {len(data)} bytes of data")
    return data[start:end].view(dtype).reshape(shape)


class TensorWriter:
    """Writes tensors of known shapes into one file or several, in any order.

    Args:
      folder: where. shapes: of every tensor, in the order in which they lie. dtype: of all.
      most: bytes of a file; 0 is one file.

    Raises:
      UserError: the disk is full.
    """

    def __init__(
        self, folder: str | os.PathLike, shapes: Mapping[str, Sequence[int]], dtype: Any, most: int = 0
    ) -> None:
        self.folder, self.dtype = pathlib.Path(folder), np.dtype(dtype)
        code = next(code for code, known in _DTYPES.items() if known == self.dtype)
        sizes = {name: math.prod(shape) * self.dtype.itemsize for name, shape in shapes.items()}
        groups: list[list[str]] = [[]]
        for name, size in sizes.items():
            if most and groups[-1] and sum(sizes[n] for n in groups[-1]) + size > most:
                groups.append([])
            groups[-1].append(name)
        self.files = [SINGLE] if len(groups) == 1 else []
        self.files = self.files or [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
        self._views: dict[str, np.ndarray] = {}
        self.written: set[str] = set()
        for file, names in zip(self.files, groups, strict=True):
            self._views |= self._create(self.folder / file, {n: shapes[n] for n in names}, code)
        if len(groups) > 1:
            places = {name: file for file, names in zip(self.files, groups, strict=True) for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}
            atomic_write(self.folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _create(self, path: pathlib.Path, shapes: Mapping[str, Sequence[int]], code: str) -> dict[str, np.ndarray]:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for this word
        at = 0
        for name, shape in shapes.items():
            size = math.prod(shape) * self.dtype.itemsize
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with explain_no_space(path, path.name), path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if hasattr(os, "posix_fallocate") and at:  # a full disk is an error here, not a fault while writing
                os.posix_fallocate(file.fileno(), 0, 8 + len(text) + at)
            else:
                file.truncate(8 + len(text) + at)
        data = np.memmap(path, np.uint8, "r+", offset=8 + len(text), shape=(at,))
        del header["__metadata__"]
        return {name: _view(data, name, entry) for name, entry in header.items()}

    def write(self, name: str, value: np.ndarray) -> None:
        """Puts a tensor in its place, in the file's dtype."""
        self._views[name][...] = value
        self.written.add(name)

    def close(self) -> None:
        """Flushes the files; raises ValueError if a tensor was never written."""
        if missing := self._views.keys() - self.written:
            raise ValueError(f"never written: {', '.join(sorted(missing))}")
        for view in {id(v.base): v for v in self._views.values()}.values():
            base = view
            while base is not None and not isinstance(base, np.memmap):
                base = base.base
            if base is not None:
                base.flush()
        self._views = {}
