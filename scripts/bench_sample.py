#!/usr/bin/env python3
"""Sampling speed on CPU: `gpt_jax.generate` on two workloads, beside Hugging Face's GPT-2.

    python scripts/bench_sample.py                                   # ours: generated tokens/s, batch 1 and 16
    python scripts/bench_sample.py --peer --peer-python PYTHON       # and Hugging Face beside it (PYTHON has it)
    python scripts/bench_sample.py --sampled                         # temperature 0.8, top-p 0.95 instead of greedy

Every implementation is one long-lived process that compiles once and then generates a block at a time, in turn with the
others: A B C A B C ... . A block is a whole call: a prompt of 16 tokens, then new ones. Ratios are medians over rounds,
with a 95% interval from a bootstrap over them. A table for people, then one line of JSON.

This process imports neither jax nor torch: it only talks to the others (`--worker`, JSON lines over pipes).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPT = 16  # tokens
HUGE_PAGES = "glibc.malloc.hugetlb=1"


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model of 256 positions, and how many tokens a block generates per row."""

    layers: int
    heads: int
    d_model: int
    vocab: int
    tokens: int
    batches: tuple[int, ...] = (1, 16)


WORKLOADS = {
    "W1": Workload(layers=6, heads=6, d_model=384, vocab=65, tokens=240),
    "W3": Workload(layers=12, heads=12, d_model=768, vocab=50304, tokens=112),
    "tiny": Workload(layers=2, heads=2, d_model=32, vocab=65, tokens=20, batches=(1, 3)),
}

# name -> (worker, variant, GLIBC_TUNABLES)
OURS = {"ours": ("jax", "", HUGE_PAGES)}
PEERS = {"hf static": ("torch", "static", ""), "hf dynamic": ("torch", "dynamic", "")}


# --- the processes that generate --------------------------------------------------------------------------------------


def serve(generate: Any) -> None:
    """Says that it is ready, then generates for each line on stdin, `batch tokens`, and reports the seconds."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        batch, tokens = map(int, line.split())
        begin = time.perf_counter()
        made = generate(batch, tokens)
        print(json.dumps({"seconds": time.perf_counter() - begin, "made": made}), flush=True)


def jax_worker(w: Workload, variant: str, sampled: bool) -> None:
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from gpt_jax.generation import generate
    from gpt_jax.model import ModelConfig, Transformer

    config = ModelConfig(
        vocab_size=w.vocab, num_layers=w.layers, d_model=w.d_model, num_heads=w.heads, max_positions=256
    )
    model = Transformer(config)
    init = jax.jit(lambda key: nn.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]))
    params = jax.block_until_ready(init(jax.random.key(0)))
    settings = dict(temperature=0.8, top_p=0.95) if sampled else dict(temperature=0.0)

    def run(batch: int, tokens: int) -> int:
        new = generate(model, params, [[1] * PROMPT] * batch, max_tokens=tokens, **settings)
        return sum(map(len, new))

    serve(run)


def torch_worker(w: Workload, variant: str, sampled: bool) -> None:
    import torch
    import transformers
    from transformers import GPT2Config, GPT2LMHeadModel

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    shape = dict(n_layer=w.layers, n_head=w.heads, n_embd=w.d_model, vocab_size=w.vocab, n_positions=256)
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None)).eval()
    settings: dict[str, Any] = dict(do_sample=True, temperature=0.8, top_p=0.95, top_k=0) if sampled else {}
    if variant == "static":
        settings["cache_implementation"] = "static"

    def run(batch: int, tokens: int) -> int:
        prompt = torch.ones(batch, PROMPT, dtype=torch.long)
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                pad_token_id=0,
                **({"do_sample": False} | settings),
            )
        return out.shape[0] * (out.shape[1] - PROMPT)

    serve(run)


# --- the process that asks --------------------------------------------------------------------------------------------


class BenchError(Exception):
    """A sentence for the person at the keyboard."""


class Worker:
    """A process that generates for one workload with one implementation."""

    def __init__(self, name: str, workload: str, args: argparse.Namespace) -> None:
        kind, variant, tunables = (OURS | PEERS)[name]
        environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"JAX_PLATFORMS": "cpu"}
        environment |= {"GLIBC_TUNABLES": tunables} if tunables else {}
        python = args.peer_python if kind == "torch" else sys.executable
        command = [python, __file__, "--worker", kind, "--variant", variant, "--workloads", workload]
        self.name = name
        self._process = subprocess.Popen(
            command + ["--sampled"] * args.sampled,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.verbose else subprocess.DEVNULL,
        )
        self._read()

    def block(self, batch: int, tokens: int) -> float:
        """Generates and returns tokens per second."""
        self._process.stdin.write(f"{batch} {tokens}\n".encode())
        self._process.stdin.flush()
        result = self._read()
        if result["made"] != batch * tokens:
            raise BenchError(f"{self.name!r} made {result['made']} tokens instead of {batch * tokens}.")
        return result["made"] / result["seconds"]

    def _read(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith(b"{"):
                return json.loads(line)
        raise BenchError(f"the process of {self.name!r} ended with code {self._process.wait()} (--verbose shows why).")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def interval(values: list[float], draws: int = 4000) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    pick = random.Random(0)
    medians = sorted(statistics.median(pick.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the rounds of a workload; prints its table; returns tokens/s and ratios by batch."""
    w = WORKLOADS[name]
    names = [n for n in (OURS | (PEERS if args.peer else {})) if not args.only or n in args.only]
    workers = [Worker(n, name, args) for n in names]
    out: dict[str, Any] = {"tokens_per_s": {}, "ratio": {}, "interval": {}}
    try:
        for batch in w.batches:
            tokens = args.tokens or w.tokens
            speeds: dict[str, list[float]] = {n: [] for n in names}
            for worker in workers:
                worker.block(batch, tokens)  # compiles
            for _ in range(args.blocks):
                for worker in workers:
                    speeds[worker.name].append(worker.block(batch, tokens))
            for n in names:
                middle = statistics.median(speeds[n])
                out["tokens_per_s"].setdefault(n, {})[str(batch)] = round(middle, 1)
                line = f"{name} batch {batch:2d} | {n:12s} | {middle:8.1f} tok/s | {1e3 * batch / middle:7.2f} ms/step"
                if n != "ours" and "ours" in speeds:
                    ratios = [a / b for a, b in zip(speeds["ours"], speeds[n], strict=True)]
                    low, high = interval(ratios)
                    out["ratio"].setdefault(n, {})[str(batch)] = round(statistics.median(ratios), 3)
                    out["interval"].setdefault(n, {})[str(batch)] = [round(low, 3), round(high, 3)]
                    line += f" | ours is {statistics.median(ratios):.2f} x ({low:.2f}-{high:.2f})"
                print(line, flush=True)
    finally:
        for worker in workers:
            worker.close()
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", default="W1,W3", help="comma-separated: " + ", ".join(WORKLOADS))
    parser.add_argument("--blocks", type=int, default=7, help="rounds")
    parser.add_argument("--tokens", type=int, default=0, help="new tokens per row; 0: the workload's")
    parser.add_argument("--sampled", action="store_true", help="temperature 0.8 and top-p 0.95 instead of greedy")
    parser.add_argument("--peer", action="store_true", help="measure Hugging Face beside it")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has torch and transformers")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="ours, hf static, hf dynamic")
    parser.add_argument("--verbose", action="store_true", help="show what the processes write on stderr")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--variant", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.workloads.split(",")
    if unknown := [n for n in names if n not in WORKLOADS]:
        print(f"bench_sample: no workload {unknown[0]!r}; there are {', '.join(WORKLOADS)}.", file=sys.stderr)
        return 1
    if args.worker:
        worker = {"jax": jax_worker, "torch": torch_worker}[args.worker]
        worker(WORKLOADS[names[0]], args.variant, args.sampled)
        return 0
    try:
        print(json.dumps({name: measure(name, args) for name in names}))
    except BenchError as error:
        print(f"bench_sample: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
