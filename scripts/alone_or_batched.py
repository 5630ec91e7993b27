#!/usr/bin/env python3
"""Does a request get the same tokens alone and in a batch? Counts those that do not, and how near to a tie they parted.

    python scripts/alone_or_batched.py --workdir runs/novels

Requests are random prompts with seeds of their own, drawn at temperature 1. A draw inverts the distribution function at
uniform numbers; where one lies near the border between two tokens, sums that round otherwise in a batch may fall on the
other side. `margin` is the distance to the nearest border where a request first parts; above 1e-4 it would be a fault.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.generation import generate
from gpt_jax.loading import Loaded, load
from gpt_jax.sampling import BLOCK

TIE = 1e-4


def margin(run: Loaded, prompt: list[int], seed: int) -> float:
    """Distance of the uniform numbers that draw the next token from the nearest border, of blocks and inside one."""
    logits = run.model.apply({"params": run.params}, jnp.asarray([prompt])).logits[0, -1]
    p = np.asarray(jax.nn.softmax(logits[: run.model.config.vocab_size]), np.float64)
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), len(prompt))
    first, second = np.asarray(jax.random.uniform(key, (2,)), np.float64)
    size = min(BLOCK, len(p))
    blocks = np.pad(p, (0, -len(p) % size)).reshape(-1, size)
    outer = blocks.sum(1).cumsum() / p.sum()
    inner = blocks[int((outer > first).argmax())].cumsum()
    return float(min(np.abs(outer - first).min(), np.abs(inner / inner[-1] - second).min()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="of each request")
    args = parser.parse_args()
    try:
        run = load(args.workdir)
    except UserError as error:
        print(f"alone_or_batched: {error}", file=sys.stderr)
        return 1
    rng, seeds = np.random.default_rng(0), list(range(1000, 1000 + args.requests))
    vocab_size = run.model.config.vocab_size
    lengths = rng.integers(1, 40, args.requests)
    prompts = [[run.tokenizer.eot, *rng.integers(0, vocab_size, n).tolist()] for n in lengths]
    settings = dict(max_tokens=args.tokens, temperature=1.0)
    alone = [
        generate(run.model, run.params, [prompt], seeds=[seed], **settings)[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    together = generate(run.model, run.params, prompts, seeds=seeds, **settings)
    margins = []
    for prompt, seed, a, b in zip(prompts, seeds, alone, together, strict=True):
        if a != b:
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            margins.append(margin(run, prompt + a[:at], seed))
            print(f"the request of seed {seed} parts at token {at + 1}, {margins[-1]:.1e} from a tie")
    found = {"requests": args.requests, "tokens": sum(map(len, alone)), "different": len(margins), "margins": margins}
    print(json.dumps({**found, "ties": all(one < TIE for one in margins)}))
    return 0 if all(one < TIE for one in margins) else 1


if __name__ == "__main__":
    sys.exit(main())
