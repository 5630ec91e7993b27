"""Machines that are not here: names, refusals, and the calls below jax's public interface that make them."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from gpt_jax.ahead import without_cache
from gpt_jax.errors import UserError
from gpt_jax.sharding import make_mesh
from gpt_jax.throughput import peak_flops
from gpt_jax.topologies import CHIPS, describe, has_cuda_plugin, parse, simulated, target_config

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
needs_cuda = pytest.mark.skipif(not has_cuda_plugin(), reason="jax's CUDA plugin is not installed")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5x:4x4", r"the kind of a topology is 'v5x' \(did you mean 'v5"),
        ("v5e", r"'v5e' is not v5e:SIZES with 2 sides of the torus, e.g. v5e:4x4"),
        ("v5p:4x4", r"with 3 sides of the torus, e.g. v5p:4x4x4"),
        ("h100:8", r"hosts x GPUs of a host, e.g. h100:4x8"),
        ("h100:0x8", r"'h100:0x8' is not"),
        ("v5e:4xx", r"'v5e:4xx' is not"),
    ],
)
def test_a_topology_that_is_misspelt_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)


def test_simulated_devices_are_those_of_this_process():
    assert simulated(4).devices == tuple(jax.devices()[:4])
    with pytest.raises(UserError, match="--devices is 64, but jax has already started with 8"):
        simulated(64)
    with pytest.raises(UserError, match="--devices is 0; it must be at least 1"):
        simulated(0)


def test_chips_have_the_peaks_that_runs_are_measured_against():
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
    for name, chip in CHIPS.items():
        assert chip.peak == peak_flops(kinds.get(name, name.upper())), name
        assert chip.capacity / chip.hbm < 0.1  # seconds to read all of the memory: units are right


@needs_libtpu
@pytest.mark.parametrize(
    ("text", "slices", "count"), [("v4:2x2x2", 1, 8), ("v5e:2x4", 1, 8), ("v6e:2x2", 1, 4), ("v5e:2x2", 2, 8)]
)
def test_a_tpu_slice_has_a_device_for_each_chip_and_says_its_slice(text, slices, count):
    machine = describe(text, slices)
    assert len(machine.devices) == count and machine.group == count // slices
    assert {d.platform for d in machine.devices} == {"tpu"}
    if slices > 1:
        mesh = make_mesh(dict(data=2), machine.devices)
        assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]


@needs_libtpu
def test_a_torus_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="libtpu knows no topology 'v5e:7x3'"):
        describe("v5e:7x3")


@needs_cuda
def test_a_gpu_cluster_compiles_with_no_gpu():
    machine = describe("h100:2x4")
    assert len(machine.devices) == 8 and machine.group == 4
    assert [d.process_index for d in machine.devices] == [0] * 4 + [1] * 4
    mesh = make_mesh(devices=machine.devices)
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    run = jax.jit(lambda x: jnp.sum(x * 2), in_shardings=cut)
    with without_cache():
        compiled = run.lower(jax.ShapeDtypeStruct((64, 128), jnp.float32)).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 64 * 128 * 4 // 8
    assert "all-reduce" in compiled.as_text()


def test_a_gpu_is_described_by_its_published_figures():
    text = target_config("a100")
    assert "major: 8" in text and "core_count: 108" in text and "device_memory_size: 80000000000" in text
