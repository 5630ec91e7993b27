"""In-context learning where a tiny model can show it: associative recall, scored against the number of shots.

An episode takes eight keys (letters) and gives each a value (a capital), anew and at random, and is a sequence of such
pairs: 'cXaQhBcX...'. What a key's value is can be known from the episode alone. Three times in four the next key is the
one that follows this key in the episode's own circle of keys, else any: were keys never foretold either, the noise of
their loss would drown what values teach (docs/LOG.md). A test item shows K pairs of different keys in any order and
asks for one of the eight: who remembers all that was shown, and that no two keys share a value, is right with
probability K/8 + (1 - K/8)/(26 - K).

    python scripts/in_context_learning.py --workdir runs/in_context

trains configs/in_context.py on such episodes (about two minutes on two cores), prints accuracy by shots beside that
optimum, writes the figure and ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import string

import numpy as np

KEYS, VALUES = string.ascii_lowercase, string.ascii_uppercase
USED = 8  # keys of an episode
PAIRS = 31  # of an episode
HABIT = 0.75  # of keys that follow the circle


def mapping(rng: np.random.Generator) -> list[tuple[str, str]]:
    """The keys of an episode and their values."""
    keys, values = (rng.permutation(len(names))[:USED] for names in (KEYS, VALUES))
    return [(KEYS[k], VALUES[v]) for k, v in zip(keys, values, strict=True)]


def episode(rng: np.random.Generator) -> str:
    """Pairs: the next one in the circle, or any."""
    pairs = mapping(rng)  # in random order: the circle
    at, text = int(rng.integers(USED)), ""
    for _ in range(PAIRS):
        text += "".join(pairs[at])
        at = (at + 1) % USED if rng.random() < HABIT else int(rng.integers(USED))
    return text


def question(rng: np.random.Generator, shots: int) -> tuple[str, int]:
    """(pairs of `shots` different keys and one of the eight keys, the index of its value)."""
    pairs = mapping(rng)
    key, value = pairs[int(rng.integers(USED))]
    shown = rng.permutation(USED)[:shots]
    return "".join("".join(pairs[i]) for i in shown) + key, VALUES.index(value)


def optimum(shots: int) -> float:
    """Accuracy of perfect memory."""
    seen = shots / USED
    return seen + (1 - seen) / (len(VALUES) - shots)


def accuracies(scorer, items: int, seed: int = 1) -> dict[int, tuple[float, float]]:
    """(accuracy, standard error) by number of shots."""
    from gpt_jax.benchmarks import Benchmark, Item, run_benchmark

    out = {}
    for shots in range(USED + 1):
        rng = np.random.default_rng((seed, shots))
        made = [
            Item(context, tuple(VALUES), answer) for context, answer in (question(rng, shots) for _ in range(items))
        ]
        found = run_benchmark(Benchmark(f"recall_{shots}", "choice", lambda made=made: made, normalise="sum"), scorer)
        out[shots] = (found["accuracy"], found["accuracy_se"])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/in_context")
    parser.add_argument("--episodes", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=0, help="0: the config's")
    parser.add_argument("--items", type=int, default=1000, help="questions for each number of shots")
    args = parser.parse_args()

    from gpt_jax.config import load
    from gpt_jax.eval_command import open_scorer
    from gpt_jax.train import train

    folder = pathlib.Path(args.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    path = folder / "episodes.jsonl"
    path.write_text("".join(json.dumps({"text": episode(rng)}) + "\n" for _ in range(args.episodes)))
    overrides = {"data.path": str(path)} | ({"steps": str(args.steps)} if args.steps else {})
    train(load("in_context", overrides), str(folder / "run"))
    _, scorer = open_scorer(str(folder / "run"), {})
    found = accuracies(scorer, args.items)
    for shots, (accuracy, error) in found.items():
        print(f"{shots} shots: {accuracy:.3f} ± {error:.3f} (perfect memory {optimum(shots):.3f})")
    draw(found, folder / "in_context.png")
    print(
        json.dumps({"accuracy": {str(k): a for k, (a, _) in found.items()}, "figure": str(folder / "in_context.png")})
    )


def draw(found: dict[int, tuple[float, float]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    shots = list(found)
    axes.plot(shots, [optimum(k) for k in shots], color="0.6", label="perfect memory")
    values, errors = zip(*found.values(), strict=True)
    axes.errorbar(shots, values, yerr=1.96 * np.array(errors), fmt="o", label="model")
    axes.set(xlabel="pairs shown", ylabel="accuracy", ylim=(0, 1.02), title="Recall from the context")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
