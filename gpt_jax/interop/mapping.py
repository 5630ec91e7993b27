"""What a mapping table is made of: where each tensor of another format lies in our stacked parameters.

A table says it once, and both directions follow: a shard of ours is gathered from the tensors that it is made of, and a
tensor of theirs is cut out of one of our leaves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpt_jax.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the other format: a row of a table.

    Attributes:
      name: its name; '{}' stands for the number of the layer.
      leaf: our parameter, below 'layers/' without its block: 'layers/attention/out/kernel'. '' holds none: zeros are
        written, and nothing but zeros is read.
      order: our axes (of one layer, without that of the parts) in the order of theirs; () is ours.
      last: how many of these make up their last axis; what comes before is their first.
      part, axis: it holds this part of ours along this axis of a layer, e.g. the keys of a fused product.
      vocabulary: ours has padded rows beyond the vocabulary.
      shape: of one without a leaf.
    """

    name: str
    leaf: str = ""
    order: tuple[int, ...] = ()
    last: int = 1
    part: int | None = None
    axis: int = 0
    vocabulary: bool = False
    shape: tuple[int, ...] = ()

    @property
    def layered(self) -> bool:
        return self.leaf.startswith("layers/") or "{}" in self.name


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models of the other codebase.

    Attributes:
      name: `model_type` in its config.json. architecture: the class that it names there.
      prefix: of all tensors but the head; files of the bare decoder have it not. ignored: regex of tensors that hold no
        parameter.
      tensors: our config -> its table. read: config.json -> options of ModelConfig, UserError naming a field that is
        not supported. write: our config -> config.json. misfits: our config -> what the family has not, in words.
    """

    name: str
    architecture: str
    prefix: str
    ignored: str
    tensors: Callable[[ModelConfig], list[Tensor]]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    misfits: Callable[[ModelConfig], list[str]]


def linear(
    name: str, product: str, sizes: tuple[int, int], part: int | None = None, bias: bool = False
) -> list[Tensor]:
    """The weight [out, in] of a PyTorch Linear, of our kernel [in, *out], and its bias.

    Args:
      sizes: numbers of our axes of input and output, that of the parts left out.
    """
    inputs, outputs = sizes
    axes = tuple(range(inputs + outputs))
    rows = [Tensor(f"{name}.weight", f"{product}/kernel", axes[inputs:] + axes[:inputs], inputs, part, inputs)]
    return rows + ([Tensor(f"{name}.bias", f"{product}/bias", last=outputs, part=part)] if bias else [])


def heads(config: ModelConfig) -> dict[str, tuple[str, int | None]]:
    """Where queries, keys and values lie: {'q': (product, part), ...}."""
    if config.kv_heads == config.num_heads:
        return {"q": ("qkv", 0), "k": ("qkv", 1), "v": ("qkv", 2)}
    return {"q": ("q", None), "k": ("kv", 0), "v": ("kv", 1)}


class Layout:
    """A table against the shapes of a model: which tensors make up a leaf, and how.

    Args:
      config: of the model. table: its Tensors. shapes: {name of our leaf: shape}, stacked over layers.
    """

    def __init__(self, config: ModelConfig, table: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.config, self.shapes = config, dict(shapes)
        # leaf -> (name of the tensor, its layer's place on the stacked axis, its row of the table)
        self.pieces: dict[str, list[tuple[str, int, Tensor]]] = {leaf: [] for leaf in shapes}
        self.zeros: dict[str, tuple[int, ...]] = {}
        self._names: list[str] = []
        period = len(config.pattern)
        once = [row for row in table if not row.layered]
        layered = [row for row in table if row.layered]
        for layer, row in [(0, r) for r in once] + [(n, r) for n in range(config.num_layers) for r in layered]:
            name = row.name.format(layer) if row.layered else row.name
            self._names.append(name)
            if not row.leaf:
                self.zeros[name] = row.shape
            else:
                leaf = row.leaf.replace("layers/", f"layers/block_{layer % period}/", 1)
                self.pieces.setdefault(leaf, []).append((name, layer // period, row))
        wrong = [leaf for leaf, parts in self.pieces.items() if not parts or leaf not in self.shapes]
        if wrong:
            raise ValueError(f"the table does not fit the model: {', '.join(wrong)}")

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of their tensors by name, in the order of the layers."""
        shapes = {name: self._shape(leaf, row) for leaf, parts in self.pieces.items() for name, _, row in parts}
        shapes |= self.zeros
        return {name: shapes[name] for name in self._names}

    def _ours(self, leaf: str, row: Tensor) -> list[int]:
        """Shape of what a tensor holds, with our axes."""
        shape = list(self.shapes[leaf][1:] if row.layered else self.shapes[leaf])
        if row.part is not None:
            del shape[row.axis]
        if row.vocabulary:
            shape[0] = self.config.vocab_size
        return shape

    def _shape(self, leaf: str, row: Tensor) -> tuple[int, ...]:
        shape = self._ours(leaf, row)
        ordered = [shape[i] for i in row.order or range(len(shape))]
        first = len(ordered) - row.last
        return tuple(math.prod(part) for part in (ordered[:first], ordered[first:]) if part)

    def gather(self, leaf: str, index: tuple[slice, ...], tensors: Mapping[str, np.ndarray], dtype: Any) -> np.ndarray:
        """Builds a shard of one of our leaves.

        Args:
          leaf: its name. index: a slice of each axis. tensors: theirs by name. dtype: of the result.
        """
        bounds = [s.indices(size)[:2] for s, size in zip(index, self.shapes[leaf], strict=True)]
        out = np.zeros([end - start for start, end in bounds], dtype)
        for name, layer, row in self.pieces[leaf]:
            inner, target = list(bounds), out
            if row.layered:
                start, end = inner.pop(0)
                if not start <= layer < end:
                    continue
                target = target[layer - start]
            if row.part is not None:
                start, end = inner.pop(row.axis)
                if not start <= row.part < end:
                    continue
                target = target[(slice(None),) * row.axis + (row.part - start,)]
            shape = self._ours(leaf, row)
            order = row.order or tuple(range(len(shape)))
            view = tensors[name].reshape([shape[i] for i in order]).transpose(np.argsort(order))
            part = view[tuple(slice(start, end) for start, end in inner)]
            target[tuple(slice(0, size) for size in part.shape)] = part
        return out

    def cut(self, leaf: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Cuts one of our leaves, whole, into their tensors: (name, tensor)."""
        for name, layer, row in self.pieces[leaf]:
            part = value[layer] if row.layered else value
            if row.part is not None:
                part = np.take(part, row.part, axis=row.axis)
            if row.vocabulary:
                part = part[: self.config.vocab_size]
            yield name, part.transpose(row.order or range(part.ndim)).reshape(self._shape(leaf, row))
