"""Tiny models, batches and comparisons that several test files share."""

import functools
import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gpt_jax.model import ModelConfig, Transformer
from gpt_jax.sharding import path_name

VOCAB = 37
SCRIPTS = pathlib.Path(__file__).resolve().parent.parent / "scripts"


def load_script(name: str):
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def tiny(**overrides) -> ModelConfig:
    """Two layers of width 16 over 37 tokens (stored as 40) and 12 learned positions."""
    default = dict(
        vocab_size=VOCAB, vocab_multiple=8, num_layers=2, d_model=16, num_heads=4, d_ff=24, max_positions=12, unroll=1
    )
    return ModelConfig(**default | overrides)


@functools.cache
def initial_params(config: ModelConfig, seed: int = 0):
    """The parameters that `init` makes."""
    init = jax.jit(Transformer(config).init)
    return jax.device_get(nn.unbox(init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]))


@functools.cache
def params_of(config: ModelConfig, noise: float = 0.2, seed: int = 0):
    """Parameters in general position, so that no bias is 0 and no scale is 1. Made by NumPy: nothing is compiled."""
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        name, x = path_name(path), noise * rng.normal(size=leaf.shape)
        if name.endswith("scale"):
            x += 1
        elif "mix_" in name:
            x += np.eye(leaf.shape[-1])
        return x.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, nn.unbox(shapes))


@functools.cache
def apply_of(config: ModelConfig, method: str | None = None):
    """The compiled model: (params, tokens, **kwargs) -> Output."""
    model = Transformer(config)
    return jax.jit(lambda params, tokens, **kwargs: model.apply({"params": params}, tokens, method=method, **kwargs))


def tokens(rows=2, length=12, seed=0, vocab=VOCAB):
    return np.random.default_rng(seed).integers(0, vocab, (rows, length)).astype(np.int32)


def text_batch(rows=8, length=12, seed=0, vocab=VOCAB, uneven=True, documents=False):
    """A batch as data delivers it, with uneven numbers of targets by row; with `documents`, two or three a row."""
    rng = np.random.default_rng(seed)
    stream = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    weights = np.ones((rows, length), np.float32)
    if uneven:
        for row in range(rows):
            weights[row, length - (row * 5) % length :] = 0
    batch = {"tokens": stream[:, :-1], "targets": stream[:, 1:], "target_weights": weights}
    if documents:
        segments = np.zeros((rows, length), np.int32)
        positions = np.zeros((rows, length), np.int32)
        for row in range(rows):
            cuts = [0, *sorted(rng.choice(np.arange(1, length - 1), 2, replace=False)), length]
            for i in range(3):
                segments[row, cuts[i] : cuts[i + 1]] = i + 1
                positions[row, cuts[i] : cuts[i + 1]] = np.arange(cuts[i + 1] - cuts[i])
        segments[weights == 0] = 0
        batch |= {"segment_ids": segments, "positions": positions}
    return batch


def assert_trees_close(a, b, **tolerance):
    """Compares leaf by leaf, naming the leaf that differs."""
    left, right = (jax.tree_util.tree_leaves_with_path(t) for t in (a, b))
    assert [p for p, _ in left] == [p for p, _ in right]
    for (path, x), (_, y) in zip(left, right, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path), **tolerance)


def assert_trees_equal(a, b):
    """Compares leaf by leaf, bit for bit."""
    assert_trees_close(a, b, rtol=0, atol=0)


def relative(a, b):
    """The largest ||a - b|| / ||b|| over leaves, each norm at least 1e-3 of the whole tree's."""
    leaves = [
        (np.asarray(x, np.float64), np.asarray(y, np.float64))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    whole = np.sqrt(sum(np.sum(y**2) for _, y in leaves))
    return max(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-3 * whole) for x, y in leaves)
