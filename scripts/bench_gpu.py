#!/usr/bin/env python3
"""Training speed on one GPU: the real train step beside PyTorch, compiled, with flash attention and bf16.

    python scripts/bench_gpu.py                                 # GPT-2 124M, context 1,024, and a deeper, wider model
    python scripts/bench_gpu.py --peer-python PYTHON --blocks 9 # an interpreter that has torch
    python scripts/bench_gpu.py --dry-run                       # a tiny model on the CPU: tests this script only

Each implementation is one long-lived process that compiles once and then trains for a block of steps, in turn with the
other: A B B A ... . Ratios are medians over blocks, with a 95% bootstrap interval. MFU is (6 N + 12 L D T) tokens/s
over the card's published bf16 peak. Parameters and moments are float32, products bf16, the gradient's norm is clipped,
a new batch is used each step; the loss is read at the end of a block (ours: each step, one step late).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import statistics
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from bench_train import BenchError, Process, Workload, interval, serve

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKLOADS = {
    "G1": Workload(layers=12, heads=12, d_model=768, context=1024, vocab=50304, batch=32, steps=20),
    "G2": Workload(layers=24, heads=16, d_model=1024, context=1024, vocab=50304, batch=16, steps=10),
}
TINY = Workload(layers=2, heads=2, d_model=32, context=16, vocab=128, batch=4, steps=3)


def workload_of(name: str) -> Workload:
    return TINY if name == "tiny" else WORKLOADS[name]


def jax_worker(w: Workload, options: dict[str, Any]) -> None:
    """Ours: `build_train_step`, with attention by cuDNN on a GPU."""
    sys.path.insert(0, str(ROOT))
    import jax
    import numpy as np

    from gpt_jax.model import ModelConfig, Transformer
    from gpt_jax.objectives.causal_lm import CausalLM
    from gpt_jax.optim import make_optimizer
    from gpt_jax.sharding import make_mesh
    from gpt_jax.step import build_train_step

    config = ModelConfig(
        vocab_size=w.vocab,
        num_layers=w.layers,
        d_model=w.d_model,
        num_heads=w.heads,
        max_positions=w.context,
        **{"dtype": "bfloat16", "flatten": True} | options,
    )
    objective = CausalLM(Transformer(config))
    mesh = make_mesh(devices=jax.devices()[:1])
    step = build_train_step(
        objective, make_optimizer("adamw", 6e-4), objective.batch_spec(w.batch, w.context), mesh=mesh
    )
    state = step.init(0)
    stream = np.random.default_rng(0).integers(0, w.vocab, 1 << 20, dtype=np.int32)
    draws = np.random.default_rng(1)

    def batch() -> Any:
        starts = draws.integers(0, len(stream) - w.context - 1, w.batch)
        rows = stream[starts[:, None] + np.arange(w.context + 1)]
        weights = np.ones((w.batch, w.context), np.float32)
        return step.put({"tokens": rows[:, :-1], "targets": rows[:, 1:], "target_weights": weights})

    def train(steps: int) -> float:
        nonlocal state
        pending = None
        for _ in range(steps):
            state, metrics = step(state, batch())
            if pending is not None:
                float(pending)
            pending = metrics["loss"]
        return float(pending)

    first = train(1)

    def block(steps: int) -> dict[str, Any]:
        train(2)
        begin = time.perf_counter()
        loss = train(steps)
        return {"seconds": time.perf_counter() - begin, "loss": loss}

    count = sum(x.size for x in jax.tree.leaves(state.params))
    serve(block, {"first_loss": first, "num_params": count, "device": jax.devices()[0].device_kind})


def torch_worker(w: Workload, options: dict[str, Any]) -> None:
    """PyTorch: the same model, torch.compile, scaled_dot_product_attention under bf16 autocast, fused AdamW."""
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional as F

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    D, H = w.d_model, w.heads

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
            self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
            self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

        def forward(self, x: Any) -> Any:
            B, T, _ = x.shape
            heads = self.qkv(self.norms[0](x)).view(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
            return x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(w.vocab, D), nn.Embedding(w.context, D)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(w.layers)), nn.LayerNorm(D)
            for name, p in self.named_parameters():
                if p.ndim > 1:
                    small = name.endswith(("out.weight", "down.weight"))
                    nn.init.normal_(p, std=0.02 / math.sqrt(2 * w.layers) if small else 0.02)
                elif name.endswith("bias"):
                    nn.init.zeros_(p)

        def forward(self, tokens: Any, targets: Any) -> Any:
            x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
            for one in self.blocks:
                x = one(x)
            logits = F.linear(self.norm(x), self.tokens.weight)
            return F.cross_entropy(logits.view(-1, w.vocab), targets.reshape(-1))

    model: Any = Model().to(device)
    params = list(model.parameters())
    decayed, rest = [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=cuda)
    if options.get("compile", True):
        model = torch.compile(model)
    stream = torch.from_numpy(np.random.default_rng(0).integers(0, w.vocab, 1 << 20, dtype=np.int64))
    draws = np.random.default_rng(1)

    def batch() -> Any:
        starts = torch.from_numpy(draws.integers(0, len(stream) - w.context - 1, w.batch))
        rows = stream[starts[:, None] + torch.arange(w.context + 1)]
        rows = rows.pin_memory().to(device, non_blocking=True) if cuda else rows
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def train(steps: int) -> float:
        for _ in range(steps):
            with torch.autocast(device, torch.bfloat16):
                loss = model(*batch())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    first = train(1)
    train(2)

    def block(steps: int) -> dict[str, Any]:
        train(2)
        begin = time.perf_counter()
        loss = train(steps)  # reads the last loss: all is done
        return {"seconds": time.perf_counter() - begin, "loss": loss}

    name = torch.cuda.get_device_name() if cuda else "cpu"
    serve(block, {"first_loss": first, "num_params": sum(p.numel() for p in params), "device": name})


def start_worker(kind: str, workload: str, python: str, options: dict[str, Any], dry: bool) -> Process:
    """Starts the process of one implementation."""
    env = os.environ | {"PYTHONUNBUFFERED": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""} if dry else {"JAX_PLATFORMS": "cuda"}
    command = [python, __file__, "--worker", kind, "--workloads", workload, "--options", json.dumps(options)]
    return Process(kind, command, env)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the blocks of one workload; returns speed, MFU, and ours over PyTorch's."""
    sys.path.insert(0, str(ROOT))
    from gpt_jax.throughput import peak_flops

    w = workload_of(name)
    ours = json.loads(args.options)
    processes: dict[str, Process] = {}
    try:
        processes["ours"] = start_worker("jax", name, sys.executable, ours, args.dry_run)
        if not args.no_peer:
            compiling = {"compile": not args.dry_run}
            processes["torch"] = start_worker("torch", name, args.peer_python, compiling, args.dry_run)
        ready = {kind: p.ready for kind, p in processes.items()}
        if len({r["num_params"] for r in ready.values()}) > 1:
            sizes = ", ".join(f"{kind} {r['num_params']:,}" for kind, r in ready.items())
            raise BenchError(f"the models differ in parameters: {sizes}.")
        for kind, r in ready.items():
            if abs(r["first_loss"] - math.log(w.vocab)) > 0.5:
                raise BenchError(f"{kind} does not start at ln V = {math.log(w.vocab):.2f}: {r['first_loss']:.2f}")
        seconds: dict[str, list[float]] = {kind: [] for kind in processes}
        for i in range(2 if args.dry_run else args.blocks):
            for kind in list(processes)[:: 1 if i % 2 else -1]:
                seconds[kind].append(processes[kind].block(w.steps)["seconds"])
    finally:
        for process in processes.values():
            process.close()
    speed = {kind: w.tokens * w.steps / statistics.median(values) for kind, values in seconds.items()}
    peak = peak_flops(ready["ours"]["device"])
    result = {"device": ready["ours"]["device"], "tokens_per_s": speed, "mfu": None, "ratio": None}
    if peak:
        result["mfu"] = {kind: value * w.flops_per_token / peak for kind, value in speed.items()}
    if "torch" in seconds:
        ratios = [b / a for a, b in zip(seconds["ours"], seconds["torch"], strict=True)]
        result["ratio"] = [statistics.median(ratios), *interval(ratios)]
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="G1,G2", help="comma-separated, of G1, G2")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has torch (default: this one)")
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    parser.add_argument("--options", default="{}", help="JSON of ModelConfig fields for ours")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU, two blocks")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        run = {"jax": jax_worker, "torch": torch_worker}[args.worker]
        run(workload_of(args.workloads), json.loads(args.options))
        return 0
    results = {}
    try:
        for name in ["tiny"] if args.dry_run else args.workloads.split(","):
            if name not in (*WORKLOADS, "tiny"):
                raise BenchError(f"--workloads has {name!r}; it takes a list of: {', '.join(WORKLOADS)}.")
            r = results[name] = measure(name, args)
            for kind, value in r["tokens_per_s"].items():
                mfu = f"{r['mfu'][kind]:.1%}" if r["mfu"] else "n/a"
                print(f"{name} on {r['device']}: {kind:6}{value:14,.0f} tokens/s, MFU {mfu}")
            if r["ratio"]:
                print(f"{name}: ours over torch {r['ratio'][0]:.3f} ({r['ratio'][1]:.3f} to {r['ratio'][2]:.3f})")
    except BenchError as error:
        print(f"bench_gpu: {error}", file=sys.stderr)
        return 1
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
