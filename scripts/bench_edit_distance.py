"""Time of the soft edit distance, forward and backward, from logits: one JSON line.

python scripts/bench_edit_distance.py [--batch=16] [--length=128] [--vocab=1000] [--repeats=20]
"""

from __future__ import annotations

import argparse
import json
import time

import jax
import numpy as np

from gpt_jax.edit_distance import mismatch_costs, soft_edit_distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 16), ("length", 128), ("vocab", 1000), ("repeats", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    logits = jax.device_put(rng.normal(size=(args.batch, args.length, args.vocab)).astype(np.float32))
    targets = jax.device_put(rng.integers(0, args.vocab, (args.batch, args.length)))
    lengths = jax.device_put(np.full(args.batch, args.length))

    def distance(logits):
        return soft_edit_distance(mismatch_costs(logits, targets), lengths, lengths).mean()

    run = jax.jit(jax.value_and_grad(distance))
    jax.block_until_ready(run(logits))
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        value, grad = jax.block_until_ready(run(logits))
        seconds.append(time.perf_counter() - start)
    assert np.isfinite(value) and np.isfinite(grad).all()
    print(json.dumps({**vars(args), "median_s": float(np.median(seconds)), "min_s": min(seconds)}))


if __name__ == "__main__":
    main()
