#!/usr/bin/env python3
"""Does perplexity reweighting help what is rare, and does it survive noise? Two modes, one row of ten rare.

    python scripts/rare_mode.py [--seeds=3] [--steps=400]

Rows are drawn from two Markov chains over the same 32 tokens: nine of ten from one, the rest from the other. In the
second corpus a tenth of all rows is uniform noise besides. Arms, the same steps, rows and seeds each:
  none      plain cross-entropy
  A         weights ~ perplexity^0.5, clipped to [0.5, 2]
  C         weights ~ (perplexity / a reference's)^0.5: the reference is a model trained on other clean rows
Measured on clean held-out rows: perplexity of either mode and of the mixture, beside the chains' own (their entropy
rates), and the part of 512 unconditional samples that the rare chain explains better. Differences from `none` are over
paired seeds, with 95% intervals (Student's t). Last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys

import jax
import numpy as np

from gpt_jax import CausalLM, ModelConfig, Transformer, build_train_step, generate, make_optimizer

V, T, RARE, NOISE = 32, 64, 0.1, 0.1
ARMS = {
    "none": {},
    "A": dict(reweight="perplexity", alpha=0.5, clip=(0.5, 2.0)),
    "C": dict(reweight="excess", alpha=0.5, clip=(0.5, 2.0)),
}


def chains(rng: np.random.Generator) -> list[np.ndarray]:
    """Two transition matrices [V, V], each row a few likely successors."""
    return [rng.dirichlet(np.full(V, 0.15), size=V) for _ in range(2)]


def draw(rng: np.random.Generator, matrices: list[np.ndarray], modes: np.ndarray) -> np.ndarray:
    """Rows [n, T + 1] of each chain (mode 0 or 1), or of noise (mode 2); begun at a random token."""
    out = rng.integers(0, V, (len(modes), T + 1))
    cumulative = np.cumsum(np.stack([*matrices, np.full((V, V), 1 / V)]), axis=2)
    for t in range(T):
        row = cumulative[modes, out[:, t]]
        out[:, t + 1] = np.minimum((row < rng.random((len(modes), 1))).sum(axis=1), V - 1)
    return out


def modes_of(rng: np.random.Generator, n: int, noise: float) -> np.ndarray:
    modes = (rng.random(n) < RARE).astype(int)
    modes[rng.random(n) < noise] = 2
    return modes


def as_batch(rows: np.ndarray) -> dict[str, np.ndarray]:
    tokens = rows.astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "target_weights": np.ones((len(rows), T), np.float32)}


def nll(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Mean nats per token of each row under a chain."""
    return -np.log(np.maximum(matrix[rows[:, :-1], rows[:, 1:]], 1e-9)).mean(axis=1)


def train(
    rows: np.ndarray, steps: int, seed: int, options: dict, reference: dict | None = None
) -> tuple[dict, CausalLM]:
    """Trains a small model on rows, 32 at a time; returns its parameters and the objective."""
    model = Transformer(ModelConfig(vocab_size=V, max_positions=T + 1, num_layers=2, d_model=64, num_heads=4))
    objective = CausalLM(model, alpha_warmup_steps=max(1, steps // 10), **options)
    step = build_train_step(objective, make_optimizer("adamw", 2e-3), objective.batch_spec(32, T), seed=seed)
    state = step.init(seed)
    if reference is not None:
        own = jax.tree.map(jax.numpy.copy, reference)  # the step donates what it is given
        state = step.with_params(state, {**state.all_params, "reference": own})
    order = np.random.default_rng([seed, 7])
    for _ in range(steps):
        state, _ = step(state, as_batch(rows[order.integers(0, len(rows), 32)]))
    return state.params["model"], objective


def measure(params: dict, model: Transformer, held: dict[str, np.ndarray], matrices: list[np.ndarray]) -> dict:
    """Perplexities on clean held-out rows, and the part of samples that the rare chain explains better."""
    evaluate = jax.jit(lambda p, tokens: model.apply({"params": p}, tokens).logits)
    out = {}
    for name, rows in held.items():
        logits = np.asarray(evaluate(params, rows[:, :-1]), np.float64)
        picked = np.take_along_axis(logits, rows[:, 1:, None], axis=2)[..., 0]
        out[name] = math.exp((np.log(np.exp(logits).sum(axis=2)) - picked).mean())
    starts = np.random.default_rng(3).integers(0, V, 512)
    new = np.array(generate(model, params, [[int(s)] for s in starts], max_tokens=48, temperature=1.0))
    new = np.concatenate([starts[:, None], new], axis=1)
    out["rare samples"] = float((nll(new, matrices[1]) < nll(new, matrices[0])).mean())
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    from scipy import stats

    found: dict[tuple[str, str], list[dict]] = {}
    for seed in range(args.seeds):
        rng = np.random.default_rng([seed, 1])
        matrices = chains(rng)
        held = {"common": draw(rng, matrices, np.zeros(256, int)), "rare": draw(rng, matrices, np.ones(256, int))}
        held["mixture"] = draw(rng, matrices, modes_of(rng, 1024, 0.0))
        reference, _ = train(draw(rng, matrices, modes_of(rng, 2000, 0.0)), args.steps, seed + 100, {})
        for corpus, noise in (("clean", 0.0), ("noisy", NOISE)):
            rows = draw(rng, matrices, modes_of(rng, 4000, noise))
            for arm, options in ARMS.items():
                params, objective = train(rows, args.steps, seed, options, reference if arm == "C" else None)
                found.setdefault((corpus, arm), []).append(measure(params, objective.model, held, matrices))
                print(f"seed {seed}, {corpus}, {arm}: {found[corpus, arm][-1]}", file=sys.stderr, flush=True)
    print(
        "| corpus | arm | common ppl | rare ppl | mixture ppl | rare samples | rare ppl, difference from none (95%) |"
    )
    print("|---|---|---|---|---|---|---|")
    result = {}
    for (corpus, arm), values in found.items():
        means = {k: statistics.mean(v[k] for v in values) for k in values[0]}
        gap = ""
        if arm != "none" and args.seeds > 1:
            paired = [v["rare"] - n["rare"] for v, n in zip(values, found[corpus, "none"], strict=True)]
            mean = statistics.mean(paired)
            half = stats.t.ppf(0.975, len(paired) - 1) * statistics.stdev(paired) / math.sqrt(len(paired))
            gap = f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"
        cells = " | ".join(f"{means[k]:.3f}" for k in ("common", "rare", "mixture", "rare samples"))
        print(f"| {corpus} | {arm} | {cells} | {gap} |")
        result[f"{corpus}/{arm}"] = values
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
