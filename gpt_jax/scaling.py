"""One dial for a whole model, and rules that carry a learning rate from a narrow model to a wide one.

The dial is depth: it sets width, heads, learning rate, batch and tokens: models of a series differ in size alone. The
transfer is that of Yang et al. (2022, arXiv:2203.03466, table 8) for Adam, relative to a base width: hidden matrices
learn at base / width of the rate and start with variance 1 / width; embeddings and norms keep both; an output layer of
its own starts and learns at base / width. Heads keep their size, so attention needs no other scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from gpt_jax.model.config import ModelConfig
from gpt_jax.model.size import count_parameters
from gpt_jax.sharding import path_name

WIDTH_PER_LAYER, HEAD = 32, 32
_EMBEDDING_OUT = "embedding_out/kernel"


def dial(depth: int, tokens_per_parameter: float = 20.0, context_length: int = 128) -> dict[str, Any]:
    """Overrides of a config by depth: the whole of a model and its training by one number.

    Args:
      depth: layers. tokens_per_parameter: of training, over parameters without embeddings (Hoffmann et al. 2022: 20).

    Returns:
      {dotted key: value}: width 32 depth, heads of 32; sequences in a batch rising with the square root of the
      parameters; Muon's rate falling with the square root of depth; steps for the tokens.
    """
    width = WIDTH_PER_LAYER * depth
    model = ModelConfig(vocab_size=1, num_layers=depth, d_model=width, num_heads=width // HEAD, positions="rope")
    parameters = count_parameters(model) - width
    batch = 8 * max(1, round(2 * (parameters / 786_432) ** 0.5))  # 8 at two layers, 16 at four
    steps = max(1, round(tokens_per_parameter * parameters / (batch * context_length)))
    return {
        "model.num_layers": depth,
        "model.d_model": width,
        "model.num_heads": width // HEAD,
        "optimizer.learning_rate": round(0.02 * (2 / depth) ** 0.5, 5),
        "batch_size": batch,
        "context_length": context_length,
        "steps": steps,
    }


def rate_multipliers(params: Any, width: int, base_width: int) -> Any:
    """The factor of every parameter's learning rate under muP, relative to `base_width`. A tree of floats."""
    factorised = _factorised(params)

    def one(path: Any, leaf: Any) -> float:
        name = path_name(path)
        return base_width / width if kind_of(name, name.startswith(factorised)) != "vector" else 1.0

    return jax.tree_util.tree_map_with_path(one, params)


def scale_initial(params: Any, width: int, base_width: int) -> Any:
    """Parameters that standard initialisation drew, with muP's deviations.

    Hidden matrices times sqrt(base / width), an untied output layer times base / width, the rest as it is. The standard
    deviation is one for all widths, but for embedding_out's, which is 1 / sqrt(width): times sqrt(base / width) too.
    """
    factorised = _factorised(params)
    root = (base_width / width) ** 0.5

    def one(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        output = root if name.endswith(_EMBEDDING_OUT) else root * root
        return leaf * {"hidden": root, "output": output, "vector": 1.0}[kind_of(name, name.startswith(factorised))]

    return jax.tree_util.tree_map_with_path(one, params)


def _factorised(params: Any) -> tuple[str, ...]:
    """What the names of the models with factorised embeddings begin with."""
    names = (path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
    return tuple(name.removesuffix(_EMBEDDING_OUT) for name in names if name.endswith(_EMBEDDING_OUT))


def kind_of(name: str, factorised: bool = False) -> str:
    """hidden (both sides grow with width), output (its input does) or vector (embeddings, norms, biases).

    With factorised embeddings the projection back from the width is the output; what follows it has a size of its own.
    """
    if name.endswith(_EMBEDDING_OUT):
        return "output"
    if name.endswith("head") or name.endswith("head/kernel"):
        return "vector" if factorised else "output"
    return "hidden" if name.endswith("kernel") and "/layers/" in f"/{name}" else "vector"


def groups_of(width: int, base_width: int, factorised: bool = False) -> tuple[tuple[str, Mapping[str, float]], ...]:
    """The same rates as `optimizer.groups` of a config, for a model with an output layer of its own.

    Args:
      factorised: the model has an `embedding_size`, and so projections to the width and back.
    """
    factor = {"lr": base_width / width}
    return ((r"model/layers/.*/kernel", factor), (rf"model/{_EMBEDDING_OUT}" if factorised else r"model/head", factor))
