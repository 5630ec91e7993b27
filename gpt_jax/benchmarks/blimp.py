"""BLiMP: 67 phenomena of English grammar, 1,000 minimal pairs each: is the good sentence likelier than the bad one?

Warstadt et al. 2020. Whole sentences are compared by their summed log-probability, so it serves very small models.
"""

from gpt_jax.benchmarks.base import Benchmark, Item
from gpt_jax.benchmarks.files import DATA, read_archive
from gpt_jax.errors import UserError, nearest


def blimp(phenomenon: str = "", path: str = f"{DATA}/blimp.tar.xz") -> Benchmark:
    """All phenomena, each a group, or the one of this name."""

    def items() -> list[Item]:
        names, found = {}, []
        for name, row in read_archive(path, sentence_good=str, sentence_bad=str):
            names[name] = None
            if phenomenon in ("", name):
                found.append(Item("", (row["sentence_good"], row["sentence_bad"]), group=name))
        if not found:
            raise UserError(f"BLiMP has no phenomenon {phenomenon!r}{nearest(phenomenon, names)}.")
        return found

    return Benchmark("blimp", "choice", items, normalise="sum", demonstrations=False)
