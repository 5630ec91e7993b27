"""Every test runs on eight simulated CPU devices; a mesh over some of `jax.devices()` picks how many it uses."""

import importlib.metadata
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Compiling is most of the suite's time: XLA optimises little, which halves it, and fuses the older way, which halves it
# again (a flag of this version: XLA ends the process that names one it does not know).
_FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
for _flag in _FLAGS:
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

import jax
import pytest

# And compiled programs are kept between runs; GPT_JAX_TEST_CACHE= (empty) is off.
_CACHE = os.environ.get("GPT_JAX_TEST_CACHE", str(pathlib.Path.home() / ".cache" / "gpt_jax" / "test_programs"))
if _CACHE:
    jax.config.update("jax_compilation_cache_dir", _CACHE)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_collection_modifyitems(items):
    """`slow` tests run last, so that a broken quick one is seen first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs of a file are dropped after it: kept, they come to gigabytes a process."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def data_folder():
    """The folder of real data that GPT_JAX_DATA names; the test is skipped by name without it."""
    folder = os.environ.get("GPT_JAX_DATA", "")
    if not folder or not pathlib.Path(folder).is_dir():
        pytest.skip("GPT_JAX_DATA names no folder of data")
    return pathlib.Path(folder)
