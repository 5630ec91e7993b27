"""Zero-, one- and few-shot benchmarks, one small file per family."""

from gpt_jax.benchmarks.base import Benchmark, Item, check_benchmark, load_benchmark, load_benchmarks, run_benchmark

__all__ = ["Benchmark", "Item", "check_benchmark", "load_benchmark", "load_benchmarks", "run_benchmark"]
