#!/usr/bin/env python3
"""Training speed on CPU: the real train step on three workloads, beside nanoGPT's model in PyTorch and plain Flax.

    python scripts/bench_train.py                                   # ours: tokens/s, MFU, time to first step, memory
    python scripts/bench_train.py --peer --peer-python PYTHON       # and the peers beside it (PYTHON has torch)
    python scripts/bench_train.py --workloads W2 --blocks 9         # a part of it

Every implementation is one long-lived process that compiles once and then trains for a block of steps at a time, in
turn with the others: A B C A B C ... . Ratios are medians over rounds, with a 95% interval from a bootstrap over them.
All processes share the same two cores; only one works at a time. A table for people, then one line of JSON.

This process imports neither jax nor torch: it only talks to the others (`--worker`, JSON lines over pipes).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import pathlib
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
# As in scripts/_venv.sh: huge pages, and freed memory is kept for the next step.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, its batch, and how many steps make a block."""

    layers: int
    heads: int
    d_model: int
    context: int
    vocab: int
    batch: int
    steps: int

    @property
    def tokens(self) -> int:
        return self.batch * self.context

    @property
    def num_params(self) -> int:
        """Parameters with biases everywhere, learned positions and the tied embedding counted once."""
        d = self.d_model
        return self.layers * (12 * d * d + 13 * d) + 2 * d + (self.vocab + self.context) * d

    @property
    def flops_per_token(self) -> float:
        """6 N + 12 L D T: forward and backward (PaLM, arXiv:2204.02311, appendix B)."""
        return 6.0 * self.num_params + 12.0 * self.layers * self.d_model * self.context


WORKLOADS = {
    "W1": Workload(layers=6, heads=6, d_model=384, context=256, vocab=65, batch=12, steps=3),
    "W2": Workload(layers=4, heads=4, d_model=128, context=64, vocab=65, batch=12, steps=40),
    "W3": Workload(layers=12, heads=12, d_model=768, context=256, vocab=50304, batch=4, steps=1),
}
TINY = Workload(layers=2, heads=2, d_model=32, context=16, vocab=65, batch=4, steps=3)  # --quick

# name -> (worker, variant, GLIBC_TUNABLES)
OURS = {"ours": ("jax", "", MALLOC), "ours (small pages)": ("jax", "", "")}
PEERS = {
    "torch eager": ("torch", "", ""),
    "torch eager + fused AdamW": ("torch", "fused", ""),
    "torch.compile": ("torch", "compile", ""),
    "torch.compile + fused AdamW": ("torch", "compile fused", ""),
    "flax": ("flax", "", "glibc.malloc.hugetlb=1"),
}


# --- the processes that train -----------------------------------------------------------------------------------------


def serve(block: Callable[[int], dict[str, Any]], ready: dict[str, Any]) -> None:
    """Says that it is ready, then trains for as many steps as each line on stdin asks and reports each block."""
    print(json.dumps(ready | {"rss": peak_rss()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(block(int(line)) | {"rss": peak_rss()}), flush=True)


def peak_rss() -> float:
    """Peak resident memory of this process so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def jax_worker(w: Workload, variant: str, started: float, model_options: dict[str, Any]) -> None:
    """Ours: what `gpt-jax train` runs, with a new batch from the loader's thread and every metric read each step."""
    sys.path.insert(0, str(ROOT))
    import jax
    import numpy as np

    from gpt_jax.data import Loader
    from gpt_jax.model import ModelConfig, Transformer
    from gpt_jax.objectives.causal_lm import CausalLM
    from gpt_jax.optim import make_optimizer, make_schedule
    from gpt_jax.step import build_train_step

    class Windows:
        """Random windows of a stream of tokens; the batch is a function of the step."""

        def __init__(self, spec: Any) -> None:
            self._spec, self._stream = spec, np.random.default_rng(0).integers(0, w.vocab, 1 << 20, dtype=np.int32)

        def spec(self) -> Any:
            return self._spec

        def batch_size(self, step: int) -> int:
            return w.batch

        def rows(self, step: int, rows: slice) -> dict[str, Any]:
            starts = np.random.default_rng((1, step)).integers(0, len(self._stream) - w.context - 1, w.batch)[rows]
            windows = self._stream[starts[:, None] + np.arange(w.context + 1)]
            weights = np.ones((len(starts), w.context), np.float32)
            return {"tokens": windows[:, :-1], "targets": windows[:, 1:], "target_weights": weights}

    config = ModelConfig(
        vocab_size=w.vocab,
        num_layers=w.layers,
        d_model=w.d_model,
        num_heads=w.heads,
        max_positions=w.context,
        **model_options,
    )
    objective = CausalLM(Transformer(config))
    rate = make_schedule("cosine", peak=1e-3, steps=100_000, warmup="100")
    step = build_train_step(
        objective, make_optimizer("adamw", rate, b2=0.99), objective.batch_spec(w.batch, w.context), clip_norm=1.0
    )
    state = step.init(0)
    batches = iter(Loader(Windows(step.batch_spec), step.batch_shardings, 0, None, prefetch=2))

    a = np.ones((2048, 2048), np.float32) if w is not TINY else np.ones((256, 256), np.float32)
    product: Any = None

    def peak() -> float:
        nonlocal product, a
        if product is None:
            a, product = jax.numpy.asarray(a), jax.jit(jax.numpy.matmul)
            product(a, a).block_until_ready()
        begin = time.perf_counter()
        product(a, a).block_until_ready()
        return 2.0 * a.shape[0] ** 3 / (time.perf_counter() - begin)

    def train(steps: int) -> float:
        nonlocal state
        pending = None
        for _ in range(steps):
            _, batch = next(batches)
            state, metrics = step(state, batch)
            if pending is not None:
                jax.device_get(pending)
            pending = metrics
        return float(jax.device_get(pending)["loss"])

    first_loss = train(1)
    first_step = time.time() - started

    def block(steps: int) -> dict[str, Any]:
        best = max(peak() for _ in range(3))
        train(1)
        begin = time.perf_counter()
        loss = train(steps)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "loss": loss, "peak": max(best, *(peak() for _ in range(2)))}

    leaves = jax.tree.leaves(jax.tree.map(lambda x: x.size, state.params))
    padding = (config.padded_vocab - config.vocab_size) * config.d_model
    serve(block, {"first_step": first_step, "first_loss": first_loss, "num_params": sum(leaves) - padding})


def torch_worker(w: Workload, variant: str, started: float, model_options: dict[str, Any]) -> None:
    """The peer: nanoGPT's model and step, re-stated (pre-norm GPT-2, tied head, AdamW on matrices, clip 1.0)."""
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    D, H = w.d_model, w.heads

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
            self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
            self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

        def forward(self, x: Any) -> Any:
            B, T, _ = x.shape
            q, k, v = (z.view(B, T, H, D // H).transpose(1, 2) for z in self.qkv(self.norm1(x)).split(D, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, D))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(w.vocab, D), nn.Embedding(w.context, D)
            self.layers = nn.ModuleList(Layer() for _ in range(w.layers))
            self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, w.vocab, bias=False)
            self.head.weight = self.tokens.weight
            for name, p in self.named_parameters():
                if p.ndim > 1:
                    residual = name.endswith(("out.weight", "down.weight"))
                    nn.init.normal_(p, std=0.02 / math.sqrt(2 * w.layers) if residual else 0.02)
                elif name.endswith("bias"):
                    nn.init.zeros_(p)

        def forward(self, tokens: Any, targets: Any) -> Any:
            x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
            for layer in self.layers:
                x = layer(x)
            logits = self.head(self.norm(x))
            return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    model: Any = GPT()
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused="fused" in variant)
    if "compile" in variant:
        model = torch.compile(model)
    stream = torch.from_numpy(np.random.default_rng(0).integers(0, w.vocab, 1 << 20, dtype=np.int64))
    draws = np.random.default_rng(1)

    def train(steps: int) -> float:
        loss = torch.zeros(())
        for _ in range(steps):
            starts = draws.integers(0, len(stream) - w.context - 1, w.batch)
            x = torch.stack([stream[i : i + w.context] for i in starts])
            y = torch.stack([stream[i + 1 : i + 1 + w.context] for i in starts])
            loss = model(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value = loss.item()
        return value

    first_loss = train(1)
    first_step = time.time() - started
    train(2)  # the compiler may specialise once more

    def block(steps: int) -> dict[str, Any]:
        train(1)
        begin = time.perf_counter()
        loss = train(steps)
        return {"seconds": time.perf_counter() - begin, "loss": loss}

    serve(block, {"first_step": first_step, "first_loss": first_loss, "num_params": sum(p.numel() for p in params)})


def flax_worker(w: Workload, variant: str, started: float, model_options: dict[str, Any]) -> None:
    """The JAX peer: the same model of Flax Linen's own layers, and optax, as tutorials have it (and nanodo)."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import linen as nn

    small = nn.initializers.normal(0.02)

    class GPT(nn.Module):
        @nn.compact
        def __call__(self, tokens: Any) -> Any:
            embed = nn.Embed(w.vocab, w.d_model, embedding_init=small)
            x = embed(tokens) + nn.Embed(w.context, w.d_model, embedding_init=small)(jnp.arange(w.context))
            mask = nn.make_causal_mask(tokens)
            for _ in range(w.layers):
                x = x + nn.MultiHeadDotProductAttention(w.heads, kernel_init=small)(nn.LayerNorm()(x), mask=mask)
                h = nn.gelu(nn.Dense(4 * w.d_model, kernel_init=small)(nn.LayerNorm()(x)))
                x = x + nn.Dense(w.d_model, kernel_init=small)(h)
            return embed.attend(nn.LayerNorm()(x))

    model = GPT()
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 100_000)
    decayed = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.99, weight_decay=0.1, mask=decayed))
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, w.context), np.int32))
    state = (params, jax.jit(tx.init)(params))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: Any, x: Any, y: Any) -> Any:
        params, moments = state

        def loss(params: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = tx.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    stream = np.random.default_rng(0).integers(0, w.vocab, 1 << 20, dtype=np.int32)
    draws = np.random.default_rng(1)

    def train(steps: int) -> float:
        nonlocal state
        value = None
        for _ in range(steps):
            starts = draws.integers(0, len(stream) - w.context - 1, w.batch)
            windows = stream[starts[:, None] + np.arange(w.context + 1)]
            state, loss = update(state, windows[:, :-1], windows[:, 1:])
            if value is not None:
                float(value)  # that of the step before, as ours reads it
            value = loss
        return float(value)

    first_loss = train(1)
    first_step = time.time() - started

    def block(steps: int) -> dict[str, Any]:
        train(1)
        begin = time.perf_counter()
        loss = train(steps)
        return {"seconds": time.perf_counter() - begin, "loss": loss}

    count = sum(leaf.size for leaf in jax.tree.leaves(state[0]))
    serve(block, {"first_step": first_step, "first_loss": first_loss, "num_params": count})


# --- the process that asks --------------------------------------------------------------------------------------------


class BenchError(Exception):
    """A sentence for the person at the keyboard."""


class Process:
    """A worker: it says what it found when it is ready, then trains a block of steps for each line on its stdin."""

    def __init__(
        self, name: str, command: list[str], environment: dict[str, str], cores: set[int] | None = None
    ) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
        )
        self.ready = self._read()

    def block(self, steps: int) -> dict[str, Any]:
        with contextlib.suppress(OSError):  # it has died: reading says why
            self._process.stdin.write(f"{steps}\n".encode())
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith(b"{"):
                return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise BenchError(f"the process of {self.name!r} ended with code {code}: {last[0]}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def start_worker(
    name: str,
    workload: str,
    kind: str,
    variant: str,
    tunables: str,
    *,
    python: str = sys.executable,
    cores: str = "",
    cache: str = "",
    model_options: str = "{}",
    env: dict[str, str] | None = None,
) -> Process:
    """Starts the process that trains one workload with one implementation."""
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= {"GLIBC_TUNABLES": tunables} if tunables else {}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    if cache:
        environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    else:
        environment |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment |= env or {}
    command = [python, __file__, "--worker", kind, "--workloads", workload, "--variant", variant]
    command += ["--started", repr(time.time()), "--model-options", model_options]
    return Process(name, command, environment, {int(c) for c in cores.split(",")} if cores else None)


def interval(ratios: list[float], draws: int = 4000) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    pick = random.Random(0)
    medians = sorted(statistics.median(pick.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]


def measure(name: str, args: argparse.Namespace, log: Callable[[str], None]) -> dict[str, Any]:
    """Starts every implementation of a workload, runs the rounds, and returns its numbers."""
    w = workload_of(name, args.quick)
    rounds, steps = (2, w.steps) if args.quick else (args.blocks, args.steps or w.steps)
    wanted = dict(OURS) | (PEERS if args.peer else {})
    if args.quick:
        wanted = {k: v for k, v in wanted.items() if k in ("ours", "torch eager")}
    if args.only:
        wanted = {k: v for k, v in wanted.items() if k in args.only}
    common = dict(cores=args.cores, model_options=args.model_options)
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        for label in ("cold", "cached"):  # the first finds an empty cache and fills it, as a first `gpt-jax train` does
            worker = start_worker("ours", quick_name(name, args.quick), *OURS["ours"], cache=cache, **common)
            worker.close()
            first[label] = worker.ready["first_step"]
    log(f"{name}: process start to first step {first['cold']:.1f} s cold, {first['cached']:.1f} s with a cache")
    workers: dict[str, Process] = {}
    blocks: dict[str, list[dict[str, Any]]] = {label: [] for label in wanted}
    try:
        for label, (kind, variant, tunables) in wanted.items():
            python = args.peer_python if kind == "torch" else sys.executable
            workers[label] = start_worker(
                label, quick_name(name, args.quick), kind, variant, tunables, python=python, **common
            )
            log(f"{name}: {label} is ready after {workers[label].ready['first_step']:.1f} s")
        labels = list(workers)
        for i in range(rounds):
            for label in labels[i % len(labels) :] + labels[: i % len(labels)]:
                blocks[label].append(workers[label].block(steps))
            rates = ", ".join(f"{k} {w.tokens * steps / v[-1]['seconds']:,.0f}" for k, v in blocks.items())
            log(f"{name}: round {i + 1} of {rounds}, tokens/s: {rates}")
    finally:
        for worker in workers.values():
            worker.close()
    return summarise(w, steps, first, workers, blocks)


def summarise(w: Workload, steps: int, first: dict, workers: dict, blocks: dict) -> dict[str, Any]:
    """From the blocks of each implementation to medians, ratios and intervals."""
    for label, worker in workers.items():
        if worker.ready["num_params"] != w.num_params:
            raise BenchError(f"{label!r} has {worker.ready['num_params']:,} parameters, not {w.num_params:,}.")
        if abs(worker.ready["first_loss"] - math.log(w.vocab)) > 0.5 or not math.isfinite(blocks[label][-1]["loss"]):
            raise BenchError(
                f"{label!r} does not train: its first loss is {worker.ready['first_loss']:.3f} "
                f"(ln V = {math.log(w.vocab):.3f}), its last {blocks[label][-1]['loss']:.3f}."
            )
    speed = {k: statistics.median(w.tokens * steps / b["seconds"] for b in v) for k, v in blocks.items()}
    memory = {k: v[-1]["rss"] for k, v in blocks.items()}
    peak = max(b["peak"] for k, v in blocks.items() for b in v if "peak" in b)
    result: dict[str, Any] = {
        "tokens_per_s": {k: round(v, 1) for k, v in speed.items()},
        "peak_gflops": round(peak / 1e9, 1),
        "mfu": {k: round(v * w.flops_per_token / peak, 4) for k, v in speed.items()},
        "memory_gb": {k: round(v, 2) for k, v in memory.items()},
        "first_step_s": {k: round(v, 2) for k, v in first.items()},
        "ratio": {},
    }
    peers = [k for k in blocks if k in PEERS]
    if peers:
        result["best_peer"] = max(peers, key=speed.get)
        for ours in (k for k in blocks if k in OURS):
            for peer in peers:
                ratios = [b["seconds"] / a["seconds"] for a, b in zip(blocks[ours], blocks[peer], strict=True)]
                low, high = interval(ratios)
                result["ratio"][f"{ours} / {peer}"] = [round(x, 4) for x in (statistics.median(ratios), low, high)]
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'':34}{'tokens/s':>10}{'MFU':>7}{'GB':>7}   ours / it (95% interval)"]
    for name, r in results.items():
        lines.append(
            f"{name}   peak {r['peak_gflops']:.0f} GFLOP/s; first step after {r['first_step_s']['cold']:.1f} s cold, "
            f"{r['first_step_s']['cached']:.1f} s with JAX's compilation cache"
        )
        for label, speed in r["tokens_per_s"].items():
            ratio = r["ratio"].get(f"ours / {label}")
            text = f"   {ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})" if ratio else ""
            text += "   <- best peer" if label == r.get("best_peer") else ""
            lines.append(f"  {label:32}{speed:10,.0f}{r['mfu'][label]:7.3f}{r['memory_gb'][label]:7.2f}{text}")
    return "\n".join(lines)


def final_line(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The JSON for scripts: ours by workload, and ratios over the best fp32 peer where there is one."""
    line: dict[str, Any] = {
        "tokens_per_s": {k: r["tokens_per_s"].get("ours") for k, r in results.items()},
        "mfu": {k: r["mfu"].get("ours") for k, r in results.items()},
        "ratio": {},
        "ratio_interval": {},
        "ratio_small_pages": {},
    }
    for k, r in results.items():
        best = r.get("best_peer")
        if best and f"ours / {best}" in r["ratio"]:
            line["ratio"][k], *line["ratio_interval"][k] = r["ratio"][f"ours / {best}"]
        if best and f"ours (small pages) / {best}" in r["ratio"]:
            line["ratio_small_pages"][k] = r["ratio"][f"ours (small pages) / {best}"][0]
    line["memory_gb"] = {k: r["memory_gb"].get("ours") for k, r in results.items()}
    line["first_step_s"] = {k: r["first_step_s"] for k, r in results.items()}
    line["workloads"] = results
    return line


def quick_name(name: str, quick: bool) -> str:
    return "tiny" if quick else name


def workload_of(name: str, quick: bool = False) -> Workload:
    return TINY if quick or name == "tiny" else WORKLOADS[name]


def check_peer(python: str) -> None:
    """Raises BenchError if the interpreter that is to run the peer has no torch."""
    try:
        found = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True)
    except OSError as error:
        raise BenchError(f"--peer-python is {python!r}, which cannot be run: {error.strerror}.") from None
    if found.returncode:
        raise BenchError(
            f"--peer needs PyTorch, which {python!r} has not: install the extra 'peer' "
            "(pip install -e '.[peer]'), or name an interpreter that has it with --peer-python."
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workloads", default="W1,W2,W3", help="comma-separated, of W1, W2, W3")
    add("--peer", action="store_true", help="measure PyTorch and plain Flax beside ours")
    add("--peer-python", default=sys.executable, help="interpreter that has torch (default: this one)")
    add("--blocks", type=int, default=7, help="rounds; each runs one block of every implementation (default 7)")
    add("--steps", type=int, default=0, help="steps in a block (default: by workload, a few seconds)")
    add("--only", default="", help="comma-separated subset of the implementations, by their names in the table")
    add("--cores", default="", help="cores to pin every process to, e.g. 0,1 (default: the first two allowed)")
    add("--quick", action="store_true", help="tiny model, two rounds, ours and PyTorch eager: tests this script only")
    add("--model-options", default="{}", help="JSON of ModelConfig fields to try on ours, e.g. '{\"unroll\": 1}'")
    for name in ("--worker", "--variant"):
        add(name, default="", help=argparse.SUPPRESS)
    add("--started", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return args
    for name in args.workloads.split(","):
        if name not in WORKLOADS:
            raise BenchError(f"--workloads has {name!r}; it takes a list of: {', '.join(WORKLOADS)}.")
    if args.blocks < 2:
        raise BenchError(f"--blocks is {args.blocks}; an interval needs at least 2.")
    args.only = [part.strip() for part in args.only.split(",") if part.strip()]
    for name in args.only:
        if name not in (*OURS, *PEERS):
            raise BenchError(f"--only has {name!r}; it takes names of: {', '.join((*OURS, *PEERS))}.")
    if not args.cores and hasattr(os, "sched_getaffinity"):
        args.cores = ",".join(str(c) for c in sorted(os.sched_getaffinity(0))[:2])
    if args.peer and set(args.only or PEERS) & {name for name, (kind, *_) in PEERS.items() if kind == "torch"}:
        check_peer(args.peer_python)
    return args


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        if args.worker:
            run = {"jax": jax_worker, "torch": torch_worker, "flax": flax_worker}[args.worker]
            run(workload_of(args.workloads), args.variant, args.started, json.loads(args.model_options))
            return 0
        if importlib.util.find_spec("jax") is None:
            raise BenchError("this interpreter has no jax: run it with the project's .venv/bin/python.")
        begin = time.time()
        results = {
            name: measure(name, args, lambda text: print(text, file=sys.stderr, flush=True))
            for name in args.workloads.split(",")
        }
    except BenchError as error:
        print(f"bench_train: {error}", file=sys.stderr)
        return 1
    print(table(results))
    print(json.dumps(final_line(results) | {"seconds": round(time.time() - begin)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
