"""The table of compiler flags: known to the compiler here, and never against the user's own."""

import importlib.util
import os
import subprocess
import sys

import pytest
from jaxlib import xla_client

from gpt_jax.compiler_flags import (
    LIBTPU,
    TABLE,
    USABLE,
    XLA,
    apply_flags,
    backend_here,
    compile_options,
    flags_for,
    options,
)
from gpt_jax.errors import UserError


def test_flags_that_the_environment_names_are_left_as_they_are():
    environ = {XLA: "--xla_gpu_enable_pipelined_all_gather=false --xla_dump_to=/tmp/x"}
    added = apply_flags(environ=environ, backend="gpu")
    assert environ[XLA].startswith("--xla_gpu_enable_pipelined_all_gather=false --xla_dump_to=/tmp/x --xla_gpu_")
    assert environ[XLA].count("pipelined_all_gather") == 1 and "--xla_gpu_enable_latency_hiding_scheduler=true" in added
    assert apply_flags(environ=environ, backend="gpu") == []  # twice changes nothing


def test_a_run_on_a_gpu_has_the_memory_that_a_plan_counts_on_unless_told_otherwise(monkeypatch):
    environ = {}
    assert apply_flags("none", environ=environ, backend="gpu") == [] == apply_flags(environ=environ, backend="cpu")
    assert environ == {}
    assert apply_flags(environ=environ, backend="gpu")[-1] == f"XLA_CLIENT_MEM_FRACTION={USABLE}"
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):  # jaxlib refuses two that are set
        own = {name: "0.5"}
        apply_flags(environ=own, backend="gpu")
        assert {key: value for key, value in own.items() if "FRACTION" in key} == {name: "0.5"}
    read = getattr(xla_client, "generate_pjrt_gpu_plugin_options", None)
    if read:  # the names are jaxlib's
        monkeypatch.setattr(os, "environ", {})
        assert "memory_fraction" not in read()
        monkeypatch.setattr(os, "environ", environ)
        assert read()["memory_fraction"] == USABLE


def test_each_backend_has_its_own_variable_and_none_has_none():
    assert list(flags_for("tpu")) == [LIBTPU] and list(flags_for("gpu")) == [XLA] and flags_for("cpu") == {}
    assert flags_for("gpu", "none") == {}
    more = ["--xla_gpu_enable_pipelined_all_reduce=false"]
    assert flags_for("gpu", "none", more) == {XLA: more}
    assert flags_for("gpu", extra=more)[XLA].count(more[0]) == 1
    assert not any("pipelined_all_reduce=true" in flag for flag in flags_for("gpu", extra=more)[XLA])


def test_a_program_that_is_compiled_ahead_has_the_flags_of_a_run():
    extra = ["--xla_gpu_enable_pipelined_all_reduce=false", "--xla_gpu_autotune_level=0"]
    environ = {XLA: "--xla_gpu_enable_pipelined_all_gather=false"}
    got = compile_options("gpu", extra=extra, environ=environ)
    assert got["xla_gpu_enable_latency_hiding_scheduler"] is True
    assert got["xla_gpu_enable_pipelined_all_reduce"] is False and got["xla_gpu_autotune_level"] == "0"
    assert "xla_gpu_enable_pipelined_all_gather" not in got  # the environment's is in force
    assert compile_options("tpu", "none", environ={}) == {} == compile_options("cpu", environ={})


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"compiler.flags is 'defualt' \(did you mean 'default'\?\)"):
        flags_for("gpu", "defualt")
    with pytest.raises(UserError, match=r"compiler.extra has 'xla_x'; a flag is written '--name=value'"):
        flags_for("gpu", extra=["xla_x"])


def test_programs_on_cpu_have_options_of_their_own():
    assert options("init") == {"xla_backend_optimization_level": 1}
    assert options("update") == {"xla_cpu_experimental_ynn_fusion_type": ""}
    assert len({(f.backend, f.where, f.name) for f in TABLE}) == len(TABLE) and all(f.why for f in TABLE)


def test_the_backend_is_told_by_the_environment():
    assert backend_here({"JAX_PLATFORMS": "cpu"}) == "cpu"
    assert backend_here({"JAX_PLATFORMS": "cuda,cpu"}) == "gpu"


def test_any_gpu_of_the_machine_makes_it_one(tmp_path):
    (tmp_path / "nvidiactl").touch()
    assert backend_here({}, tmp_path) == "cpu"
    (tmp_path / "nvidia3").touch()
    assert backend_here({}, tmp_path) == "gpu" and backend_here({"JAX_PLATFORMS": "cpu"}, tmp_path) == "cpu"


@pytest.mark.slow
def test_xla_knows_the_flags_for_gpus():
    """XLA ends a process that names a flag it does not know, on any backend."""
    for more, code in (("", 0), (" --xla_gpu_no_such_flag=1", 1)):
        flags = " ".join(flags_for("gpu")[XLA]) + more
        done = subprocess.run(
            [sys.executable, "-c", "import jax; jax.numpy.ones(2).block_until_ready()"],
            env=os.environ | {"JAX_PLATFORMS": "cpu", XLA: flags}, capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode != 0) == code, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)")
def test_libtpu_knows_the_flags_for_tpus():
    program = """
import jax
from jax.experimental import topologies
t = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", chips_per_host_bounds=[2, 2, 1])
mesh = jax.sharding.Mesh(t.devices, ("x",))
s = jax.sharding.NamedSharding(mesh, jax.P("x"))
jax.jit(lambda x: x.sum(), in_shardings=s).lower(jax.ShapeDtypeStruct((8,), "float32")).compile()
"""
    for more, code in (("", 0), (" --xla_tpu_no_such_flag=1", 1)):
        flags = " ".join(flags_for("tpu")[LIBTPU]) + more
        environment = os.environ | {"JAX_PLATFORMS": "cpu", LIBTPU: flags, "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": ""}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert (done.returncode != 0) == code, done.stderr
