"""Zero-, one- and few-shot benchmarks, one small file per family."""

from gpt_jax.benchmarks.base import Benchmark, Item, load_benchmark, load_benchmarks, run_benchmark

__all__ = ["Benchmark", "Item", "load_benchmark", "load_benchmarks", "run_benchmark"]
