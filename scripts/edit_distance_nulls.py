"""How often Levenshtein differs from the count of wrong tokens: what an edit-distance regulariser can add.

    python scripts/edit_distance_nulls.py [--sequences=150] [--length=128] [--seed=0]

Sequences of tokens drawn independently by Zipf's law are corrupted in three ways, and their Levenshtein distance to the
original is compared with their Hamming distance:
  iid       15% of the positions, each filled by a draw of its own;
  spans     15% of the positions in runs of 3 or 8, filled by independent draws;
  shifts    three runs of 8, each moved on by one token (a generator that puts in a token and runs out of room).

Prints a row per setting and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from gpt_jax.edit_distance import levenshtein

RATE = 0.15


def zipf(vocab: int) -> np.ndarray:
    """Probabilities ~ 1 / rank."""
    p = 1.0 / np.arange(1, vocab + 1)
    return p / p.sum()


def runs(rng: np.random.Generator, length: int, size: int, count: int) -> np.ndarray:
    """Starts of `count` runs of `size` tokens that do not touch, at random."""
    gaps = np.sort(rng.choice(length - count * size + 1, count, replace=False))
    return gaps + size * np.arange(count)


def corrupt(rng: np.random.Generator, tokens: np.ndarray, p: np.ndarray, kind: str, size: int) -> np.ndarray:
    """Returns a corrupted copy of a sequence."""
    out, length = tokens.copy(), len(tokens)
    if kind == "iid":
        at = rng.choice(length, round(RATE * length), replace=False)
        out[at] = rng.choice(len(p), len(at), p=p)
        return out
    count = 3 if kind == "shifts" else round(RATE * length / size)
    for start in runs(rng, length, size, count):
        run = slice(start, start + size)
        fill = rng.choice(len(p), 1 if kind == "shifts" else size, p=p)
        out[run] = np.concatenate([fill, tokens[run]])[:size]
    return out


def measure(rng: np.random.Generator, vocab: int, kind: str, size: int, sequences: int, length: int) -> dict:
    """Compares the two distances on many sequences."""
    p = zipf(vocab)
    pairs = []
    for _ in range(sequences):
        tokens = rng.choice(vocab, length, p=p)
        other = corrupt(rng, tokens, p, kind, size)
        pairs.append((levenshtein(other, tokens), int((other != tokens).sum())))
    lev, hamming = np.array(pairs).T
    return {
        "vocab": vocab,
        "kind": kind if kind == "iid" else f"{kind} of {size}",
        "equal": int((lev == hamming).sum()),
        "sequences": sequences,
        "levenshtein": float(lev.mean()),
        "hamming": float(hamming.mean()),
        "gap": float(1 - lev.sum() / hamming.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=150)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    for vocab in (1000, 30):
        for kind, size in (("iid", 1), ("spans", 3), ("spans", 8), ("shifts", 8)):
            rng = np.random.default_rng([args.seed, vocab, size, len(kind)])
            rows.append(row := measure(rng, vocab, kind, size, args.sequences, args.length))
            print(
                f"V={vocab:<5} {row['kind']:<12} equal on {row['equal']:>3}/{args.sequences}   "
                f"Levenshtein {row['levenshtein']:6.2f}   Hamming {row['hamming']:6.2f}   gap {row['gap']:.1%}"
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
