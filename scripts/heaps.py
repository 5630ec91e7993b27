#!/usr/bin/env python3
"""How a corpus' vocabulary grows with its length: Heaps' law, distinct words = K n^beta, fitted over doublings of n.

    python scripts/heaps.py                                          # the embedded corpus, Python's documentation
    python scripts/heaps.py --path '$GPT_JAX_DATA/lm/novels_en_train.jsonl.xz'

Exponential growth would be a straight line in n itself; beta below 1 is growth slower than linear. A row per doubling
and, last, one JSON line with beta and the R^2 of the fit in logarithms.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator

import numpy as np

WORD = re.compile(r"\w+")
FIRST = 1024  # words of the first row: below it the law is noise


def growth(words: Iterator[str]) -> list[tuple[int, int]]:
    """(words read, distinct ones among them) at each doubling and at the end."""
    seen: set[str] = set()
    rows, due, n = [], FIRST, 0
    for n, word in enumerate(words, 1):
        seen.add(word)
        if n == due:
            rows.append((n, len(seen)))
            due *= 2
    return rows if not n or (rows and rows[-1][0] == n) else [*rows, (n, len(seen))]


def fit(rows: list[tuple[int, int]]) -> tuple[float, float]:
    """(beta, R^2) of log distinct against log read, by least squares."""
    x, y = np.log(np.array(rows, float)).T
    beta, start = np.polyfit(x, y, 1)
    return float(beta), float(1 - np.var(y - beta * x - start) / np.var(y))


def main() -> int:
    from gpt_jax.data.corpora import iter_documents
    from gpt_jax.errors import UserError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="", help="files, as data.path; default: the embedded corpus")
    args = parser.parse_args()
    try:
        rows = growth(word.lower() for _, text in iter_documents(path=args.path) for word in WORD.findall(text))
    except UserError as error:
        print(f"heaps: {error}", file=sys.stderr)
        return 1
    if len(rows) < 3:
        print(f"heaps: the corpus has fewer than {2 * FIRST} words; a growth needs more.", file=sys.stderr)
        return 1
    for read, distinct in rows:
        print(f"{read:>12,} words  {distinct:>9,} distinct")
    beta, r2 = fit(rows)
    print(json.dumps({"words": rows[-1][0], "distinct": rows[-1][1], "beta": round(beta, 4), "r2": round(r2, 5)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
