"""Implementations of attention by name: what each lacks is refused, what each has agrees with the plain one."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import tiny
from test_topologies import needs_libtpu

from gpt_jax.errors import UserError
from gpt_jax.flops import count_flops
from gpt_jax.model import implementations
from gpt_jax.model.attention import Mask, Variant, attend
from gpt_jax.model.chunks import attend_chunks
from gpt_jax.model.config import LACKS
from gpt_jax.model.implementations import lacking, run_attention, splash
from gpt_jax.sharding import DEFAULT_RULES, make_mesh

DEVICES = jax.devices()
B, T, H, K = 2, 256, 4, 16


def draws(kv_heads=H):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(B, T, heads, K)).astype(np.float32) for heads in (H, kv_heads, kv_heads)]


def documents():
    cuts = np.array([[0, 100, 180, T], [0, 3, 128, T]])
    return jnp.asarray([np.repeat([1, 2, 3], np.diff(row)) for row in cuts], jnp.int32)


SPLASH = {
    "causal": (dict(), dict(), H),
    "window": (dict(), dict(window=40), H),
    "documents": (dict(segments_BxT=documents()), dict(), H),
    "documents_window_grouped": (dict(segments_BxT=documents()), dict(window=40), 2),
    "softcap": (dict(), dict(softcap=2.0), H),
    "bidirectional": (dict(kind="bidirectional"), dict(), H),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLASH)
def test_splash_interpreted_equals_plain_attention_in_values_and_gradients(name):
    mask, variant, kv_heads = SPLASH[name]
    mask, variant = Mask(**mask), Variant(**variant)

    def run(function):
        out, pull = jax.vjp(function, *draws(kv_heads))
        return out, *pull(jnp.asarray(np.random.default_rng(1).normal(size=out.shape), jnp.float32))

    ours = run(lambda q, k, v: splash(q, k, v, mask, variant, interpret=True))
    plain = run(functools.partial(attend, mask=mask, variant=variant, block=None))
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("name", LACKS)
@pytest.mark.parametrize(
    ("options", "what"),
    [
        (dict(positions="alibi"), "alibi"),
        (dict(talking_heads=True), "talking_heads"),
        (dict(dropout=0.1), "dropout"),
        (dict(attention_softcap=5.0), "attention_softcap"),
    ],
)
def test_what_an_implementation_lacks_is_refused_when_the_config_is_read(name, options, what):
    if what in LACKS[name]:
        with pytest.raises(UserError, match=f"attention is '{name}', which does not support {what}"):
            tiny(attention=name, **options)
    else:
        tiny(attention=name, **options)


def test_what_only_the_batch_can_tell_is_refused_by_name():
    prefix = Mask("prefix", prefix_BxT=jnp.zeros((B, T), bool))
    segments = Mask(segments_BxT=documents())
    q = (B, T, H, K)
    assert lacking(prefix, Variant(), q, "splash") == ["prefix masks"]
    assert lacking(segments, Variant(), q, "splash") == []
    assert lacking(segments, Variant(), q, "cudnn") == ["documents kept apart"]
    assert lacking(Mask(), Variant(), (B, 100, H, K), "splash") == ["lengths of a device that 128 does not divide"]
    assert lacking(Mask("bidirectional"), Variant(window=3), q, "cudnn") == ["a window that looks ahead"]
    assert lacking(prefix, Variant(alibi=True), q, "chunks") == []


def on_a_gpu(monkeypatch, capability="9.0"):
    """Pretends that a GPU is here; returns the list of the shapes that cuDNN's attention was asked for."""
    asked = []
    monkeypatch.setattr(implementations, "_platform", lambda mesh: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [type("Device", (), {"compute_capability": capability})])
    monkeypatch.setattr(implementations, "_cudnn", lambda q, k, v, mask, variant: asked.append(q.shape) or q)
    return asked


@pytest.mark.parametrize(
    ("capability", "size", "dtype", "what"),
    [
        ("9.0", 64, jnp.bfloat16, ""),
        ("9.0", 64, jnp.float32, "float32"),
        ("9.0", 256, jnp.bfloat16, ""),
        ("9.0", 264, jnp.bfloat16, r"head sizes above 128 \(256 from Hopper on\)"),
        ("8.0", 128, jnp.bfloat16, ""),
        ("8.0", 136, jnp.bfloat16, r"head sizes above 128 \(256 from Hopper on\)"),
    ],
)
def test_auto_takes_cudnn_only_for_what_cudnn_computes(monkeypatch, capability, size, dtype, what):
    asked = on_a_gpu(monkeypatch, capability)
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 2, size)), dtype)
    out = run_attention(q, q, q, Mask(), Variant(), name="auto", block=8)
    assert len(asked) == (not what)
    if what:
        np.testing.assert_allclose(out, attend(q, q, q, Mask(), Variant(), block=None), rtol=0.02, atol=1e-5)
        with pytest.raises(UserError, match=f"model.attention is 'cudnn', which does not support {what}.$"):
            run_attention(q, q, q, Mask(), Variant(), name="cudnn", block=8)


def test_float32_under_cudnn_is_refused_when_the_config_is_read():
    with pytest.raises(UserError, match="attention is 'cudnn', which does not support float32"):
        tiny(attention="cudnn", dtype="float32")
    tiny(attention="cudnn", dtype="bfloat16")


def test_a_sequence_that_the_mesh_cuts_goes_to_no_kernel_that_cannot_have_its_parts(monkeypatch):
    asked = on_a_gpu(monkeypatch)
    q = jnp.asarray(np.random.default_rng(0).normal(size=(2, 128, 2, 8)), jnp.bfloat16)
    run = functools.partial(run_attention, mask=Mask(), variant=Variant(), block=64)
    with jax.set_mesh(make_mesh(fsdp=2, sequence=2, devices=DEVICES[:4])), nn.logical_axis_rules(DEFAULT_RULES):
        out = jax.jit(functools.partial(run, name="auto"))(q, q, q)
        with pytest.raises(UserError, match="'cudnn', which does not support a sequence that the mesh cuts"):
            jax.jit(functools.partial(run, name="cudnn"))(q, q, q)
        monkeypatch.setattr(implementations, "_platform", lambda mesh: "tpu")
        with pytest.raises(UserError, match="'splash', which does not support lengths of a device that 128 does not"):
            jax.jit(functools.partial(run, name="splash"))(q, q, q)  # 64 tokens on each device
        jax.jit(functools.partial(run, name="auto"))(q, q, q)
    assert not asked
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(attend(q, q, q, Mask(), Variant(), block=None), np.float32), atol=0.03
    )


@pytest.mark.parametrize(("name", "device"), [("splash", "tpu"), ("cudnn", "gpu")])
def test_a_kernel_whose_device_is_not_here_is_refused(name, device):
    with pytest.raises(UserError, match=f"model.attention is '{name}', which runs on a {device}, not on a cpu"):
        run_attention(*draws(), Mask(), Variant(), name=name, block=64)


def test_an_implementation_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"attention is 'splosh' \(did you mean 'splash'\?\)"):
        tiny(attention="splosh")


def work(length, window):
    shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    run = functools.partial(attend_chunks, mask=Mask(), variant=Variant(window=window), chunk=16)
    return count_flops(jax.make_jaxpr(jax.grad(lambda *x: jnp.sum(run(*x)), (0, 1, 2)))(shape, shape, shape))


def test_a_banded_layer_costs_in_proportion_to_the_length():
    assert work(1024, 16) == pytest.approx(4 * work(256, 16), rel=0.01)
    assert work(1024, None) == pytest.approx(16 * work(256, None), rel=0.01)
    assert work(256, 16) < 0.2 * work(256, None)


def test_no_chunk_keeps_the_scores_of_all():
    def temporaries(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        run = functools.partial(attend_chunks, mask=Mask(), variant=Variant(window=16), chunk=16)
        compiled = jax.jit(jax.grad(lambda *x: jnp.sum(run(*x) ** 2), (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(512), temporaries(2048)
    assert long < 4.5 * short and long < 2048 * 2048 * 4


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("sequence", [1, 2])
def test_splash_compiles_in_a_shard_map_over_documents_and_bands(sequence):
    from gpt_jax.ahead import abstract_step
    from gpt_jax.config import load
    from gpt_jax.topologies import describe

    keys = {"context_length": "512", "batch_size": "8", "data.doc_mask": "True", "mesh.tensor": "2"}
    keys |= {"mesh.sequence": str(sequence), "model.pattern": "('dense', 'band')", "model.window": "64"}
    keys |= {"model.num_layers": "2", "model.unroll": "1", "model.dtype": "bfloat16", "optimizer.name": "adamw"}
    keys |= {"model.attention": "splash", "model.num_kv_heads": "2", "model.vocab_size": "512"}
    _, step = abstract_step(load("quickstart", keys), describe("v5e:2x4"))
    lowered = step.lower()
    assert "tpu_custom_call" in lowered.as_text()
    text = lowered.compile().as_text()
    assert text.count("tpu_custom_call") >= 4  # forward and backward of both kinds of layers


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry():
    has_torch = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode == 0
    command = [sys.executable, "scripts/bench_gpu.py", "--dry-run", *([] if has_torch else ["--no-peer"])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])["tiny"]
    assert result["tokens_per_s"]["ours"] > 0 and result["mfu"] is None  # of a CPU no peak is published
    assert (result["ratio"] is not None) == has_torch


@pytest.mark.slow
@pytest.mark.parametrize("script", ["bench_banded", "plan_vs_measured"])
def test_the_scripts_of_the_pods_page_run_dry(script):
    done = subprocess.run([sys.executable, f"scripts/{script}.py", "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout.splitlines()[-1])
