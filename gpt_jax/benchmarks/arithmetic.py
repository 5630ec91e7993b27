"""GPT-3's arithmetic: 2,000 questions each of sums, differences and products of up to six digits (Brown et al. 2020).

An answer is right if greedy decoding gives all its tokens; what follows it is not looked at, as in
lm-evaluation-harness.
"""

from gpt_jax.benchmarks.base import Benchmark, Item
from gpt_jax.benchmarks.files import DATA, read_archive
from gpt_jax.errors import UserError, nearest


def arithmetic(kind: str = "", path: str = f"{DATA}/gpt3_arithmetic.tar.xz") -> Benchmark:
    """All sets, each a group, or the one of this name ('two_digit_addition')."""

    def items() -> list[Item]:
        names, found = {}, []
        for name, row in read_archive(path, context=str, completion=str):
            names[name] = None
            if kind in ("", name):
                found.append(Item(row["context"].strip(), (row["completion"],), group=name))
        if not found:
            raise UserError(f"there is no arithmetic set {kind!r}{nearest(kind, names)}; allowed: {', '.join(names)}.")
        return found

    return Benchmark("arithmetic", "greedy", items)
