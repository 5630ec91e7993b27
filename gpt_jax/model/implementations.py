"""Which code computes attention: one name of the config, lowered for the devices at hand, cut over their mesh.

    dense    all [T, T] scores at once
    blocks   unrolled blocks of queries that skip the keys a mask hides (gpt_jax/model/attention.py)
    chunks   a loop over blocks of queries (gpt_jax/model/chunks.py); O(T w) for banded layers
    splash   TPU: Pallas' splash attention, which skips hidden blocks and stores no scores
    cudnn    GPU: cuDNN's flash attention
    auto     splash on a TPU and cudnn on a GPU where they support the layer, else chunks; blocks on a CPU

What `splash` and `cudnn` do not support (`LACKS`) is refused by name. Where the mesh cuts sequences, queries stay where
they are and each device gathers the keys and values of its rows (chunks, splash).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax
from jax.sharding import PartitionSpec

from gpt_jax.errors import UserError
from gpt_jax.model.attention import Mask, Variant, attend
from gpt_jax.model.chunks import attend_chunks
from gpt_jax.model.config import LACKS

_PLATFORM = {"splash": "tpu", "cudnn": "gpu"}


def run_attention(q: Array, k: Array, v: Array, mask: Mask, variant: Variant, *, name: str, block: int) -> Array:
    """Self-attention by the implementation of a name; see `attend` for the arguments.

    Raises:
      UserError: an implementation that lacks what the layer needs, or whose device is not there.
    """
    mesh = _mesh()
    platform = _platform(mesh)
    missing = functools.partial(lacking, mask, variant, q.shape, dtype=q.dtype, cut=_pieces(mesh))
    if name == "auto":
        fast = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "blocks")
        name = fast if fast == "blocks" or not missing(fast) else "chunks"
    elif name in LACKS:
        if platform != _PLATFORM[name]:
            raise UserError(f"model.attention is {name!r}, which runs on a {_PLATFORM[name]}, not on a {platform}.")
        if missing(name):
            raise UserError(f"model.attention is {name!r}, which does not support {', '.join(missing(name))}.")
    if name in ("dense", "blocks"):
        return attend(q, k, v, mask, variant, block=block if name == "blocks" else None)
    if name == "cudnn":
        return _over_mesh(_cudnn, mesh, q, k, v, mask, variant)
    if name == "splash":
        return splash(q, k, v, mask, variant, mesh)
    chunks = functools.partial(attend_chunks, chunk=block)
    whole = variant.mix_scores_HxH is not None or variant.keys_B is not None or variant.alibi
    if mesh is None or mesh.shape.get("sequence", 1) == 1 or whole:
        return chunks(q, k, v, mask, variant)
    return _over_mesh(chunks, mesh, q, k, v, mask, variant)


def lacking(
    mask: Mask, variant: Variant, q_shape: tuple[int, ...], name: str, *, dtype: Any = jnp.bfloat16, cut: int = 1
) -> list[str]:
    """Returns what a layer needs and an implementation does not have; `cut`: parts of a sequence on as many devices."""
    has = {
        "prefix masks": mask.kind == "prefix",
        "documents kept apart": mask.segments_BxT is not None,
        "alibi": variant.alibi,
        "attention_softcap": bool(variant.softcap),
        "talking_heads": variant.mix_scores_HxH is not None,
        "dropout": variant.keys_B is not None,
        "a window that looks ahead": variant.window is not None and mask.kind != "causal",
        "lengths of a device that 128 does not divide": bool(q_shape[1] % (128 * cut)),
        "head sizes that 8 does not divide": bool(q_shape[3] % 8),
        "head sizes above 128 (256 from Hopper on)": q_shape[3] > _largest_head(),
        "a sequence that the mesh cuts": cut > 1,
        "float32": jnp.dtype(dtype) == jnp.float32,
    }
    return [what for what in LACKS.get(name, ()) if has[what]]


def _largest_head() -> int:
    """The largest head of cuDNN's attention on the GPU at hand."""
    capability = re.match(r"\d+", str(getattr(jax.devices()[0], "compute_capability", "")))
    return 256 if capability and int(capability[0]) >= 9 else 128


def _mesh() -> Any:
    """The mesh that the train step is traced under, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def _platform(mesh: Any) -> str:
    """tpu, gpu or cpu: of the mesh that the program is made for, else of the devices here."""
    device = getattr(mesh or jax.sharding.get_abstract_mesh(), "abstract_device", None)
    platform = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def _specs(mesh: Any, heads: int, kv_heads: int) -> tuple[Any, Any, Any]:
    """Mesh axes of the rows, the tokens and the heads of an activation, as the rules in force say."""
    found = nn.logical_to_mesh_axes(("batch", "sequence", "heads"))
    rows, tokens, cut = found or (None, None, None)
    size = 1 if cut is None else np.prod([mesh.shape[a] for a in ((cut,) if isinstance(cut, str) else cut)])
    if heads % size or kv_heads % size:
        cut = None  # heads that the mesh does not divide are whole on every device
    return rows, tokens, cut


def _pieces(mesh: Any) -> int:
    """Parts that the mesh cuts a sequence into."""
    tokens = None if mesh is None else _specs(mesh, 1, 1)[1]
    return 1 if tokens is None else mesh.shape[tokens]


def _over_mesh(
    function: Callable[..., Array], mesh: Any, q: Array, k: Array, v: Array, mask: Mask, variant: Variant
) -> Array:
    """Runs attention on each device's rows, heads and queries, with the keys of the whole rows."""
    if mesh is None:
        return function(q, k, v, mask, variant)
    rows, tokens, heads = _specs(mesh, q.shape[2], k.shape[2])
    cut = tokens is not None and mesh.shape[tokens] > 1
    array, row = PartitionSpec(rows, tokens, heads), PartitionSpec(rows, tokens)

    def local(q, k, v, mask):
        if not cut:
            return function(q, k, v, mask, variant)
        k, v, mask = jax.tree.map(lambda x: lax.all_gather(x, tokens, axis=1, tiled=True), (k, v, mask))
        return function(q, k, v, mask, variant, start=lax.axis_index(tokens) * q.shape[1])

    specs = (array, array, array, jax.tree.map(lambda _: row, mask))
    return jax.shard_map(local, in_specs=specs, out_specs=array, check_vma=False)(q, k, v, mask)


def _cudnn(q, k, v, mask, variant):
    window = None if variant.window is None else (variant.window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=mask.kind == "causal", local_window_size=window, implementation="cudnn"
    )


def splash(
    q: Array, k: Array, v: Array, mask: Mask, variant: Variant, mesh: Any = None, *, interpret: bool = False
) -> Array:
    """Pallas' splash attention, causal or bidirectional, banded, over documents, in a shard_map over a mesh.

    Padding (segment 0) sees padding here and nothing elsewhere: what comes of it is never used.
    """
    T, H = q.shape[1:3]
    rows, tokens, heads = _specs(mesh, H, k.shape[2]) if mesh is not None else (None, None, None)
    cut = mesh.shape[tokens] if tokens is not None else 1
    pieces = mesh.shape[heads] if heads is not None else 1
    kernel = _kernel(T, H, mask.kind, variant.window, variant.softcap, pieces, cut, interpret)

    def local(kernel, q, k, v, segments):
        ids = None
        if cut > 1:
            k, v = (lax.all_gather(x, tokens, axis=1, tiled=True) for x in (k, v))
        if segments is not None:
            from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

            whole = lax.all_gather(segments, tokens, axis=1, tiled=True) if cut > 1 else segments
            ids = SegmentIds(q=segments, kv=whole)
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        out = jax.vmap(kernel)(q, k, v, ids)
        return jnp.swapaxes(out, 1, 2).astype(v.dtype)

    if mesh is None:
        return local(kernel, q, k, v, mask.segments_BxT)
    array, row = PartitionSpec(rows, tokens, heads), PartitionSpec(rows, tokens)
    spread = kernel.manual_sharding_spec(jax.sharding.NamedSharding(mesh, PartitionSpec(heads, tokens)))
    specs = (spread, array, array, array, None if mask.segments_BxT is None else row)
    run = jax.shard_map(local, in_specs=specs, out_specs=array, check_vma=False)
    return run(kernel, q, k, v, mask.segments_BxT)


def _kernel(T: int, H: int, kind: str, window: int | None, softcap: float, heads: int, queries: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if window is not None:
        one = masks.LocalMask((T, T), (window - 1, 0 if kind == "causal" else window - 1), offset=0)
    else:
        one = masks.CausalMask((T, T)) if kind == "causal" else masks.FullMask((T, T))
    side = next(size for size in (512, 256, 128) if (T // queries) % size == 0)
    sizes = kernels.BlockSizes(
        block_q=side,
        block_kv=side,
        block_kv_compute=side,
        block_q_dkv=side,
        block_kv_dkv=side,
        block_kv_dkv_compute=side,
        block_q_dq=side,
        block_kv_dq=side,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([one] * H),
        block_sizes=sizes,
        head_shards=heads,
        q_seq_shards=queries,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
