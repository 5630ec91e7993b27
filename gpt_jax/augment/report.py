"""What synthetic examples are like beside the originals: fidelity of labels, variety, copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gpt_jax.augment.base import Counts, Synthetic
from gpt_jax.text_quality import copy_rate, distinct_n, self_bleu


def fidelity(
    examples: Sequence[Any], probabilities: Callable[[Sequence[str]], np.ndarray], labels: Sequence[str]
) -> float:
    """Share of examples whose label an oracle, a classifier trained on all data, predicts."""
    best = probabilities([e.text for e in examples]).argmax(1)
    return float(np.mean([labels[i] == e.label for i, e in zip(best.tolist(), examples, strict=True)]))


def figures(texts: Sequence[str], train: Sequence[str] = ()) -> dict[str, float]:
    """Variety of texts and, given the originals, how much of them is copied."""
    out = {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)}
    if len(texts) > 1:
        out["self_bleu_4"] = self_bleu(texts)
    out["words"] = float(np.mean([len(text.split()) for text in texts]))
    if train:
        out |= {"copied": copy_rate(texts, train), "copied_4grams": copy_rate(texts, train, 4)}
    return out


def write_report(
    examples: Sequence[Synthetic],
    train: Sequence[Any],
    counts: Counts,
    provenance: Mapping[str, Any],
    measured: Mapping[str, Mapping[str, float]],
    shown: int = 4,
) -> str:
    """Returns the report, Markdown.

    Args:
      measured: {"synthetic": figures, "originals": figures}. shown: examples of each class.
    """
    made = ", ".join(f"{name} {value}" for name, value in provenance.items() if value not in ("", None))
    lines = [
        "# Synthetic examples",
        "",
        made,
        "",
        "| generated | duplicates | in dev or test | filtered | left | kept |",
    ]
    lines += ["|" + "---:|" * 6]
    lines += [
        f"| {counts.generated} | {counts.duplicates} | {counts.overlaps} | {counts.filtered} | {counts.left} "
        f"| {counts.selected} |",
        "",
    ]
    names = list(dict.fromkeys(name for values in measured.values() for name in values))
    lines += ["| | " + " | ".join(measured) + " |", "|---|" + "---:|" * len(measured)]
    for name in names:
        cells = [f"{values[name]:.4g}" if name in values else "" for values in measured.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for label in dict.fromkeys(e.label for e in train):
        own = [e for e in examples if e.label == label][:shown]
        lines += ["", f"## {label}", "", "| original | synthetic |", "|---|---|"]
        originals = [e for e in train if e.label == label]
        for k, example in enumerate(own):
            source = train[example.parent] if example.parent >= 0 else originals[k % len(originals)]
            lines.append(f"| {_cell(source.text)} | {_cell(example.text)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split())[:200].replace("|", "\\|")
