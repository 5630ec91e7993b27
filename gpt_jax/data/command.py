"""The command `gpt-jax data`: prepares tokenizer and token store, shows statistics and training rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import numpy as np

from gpt_jax.data.baselines import baselines, describe
from gpt_jax.data.prepare import Data, prepare_data

_COLOURS = {"full": "", "part": "\033[33m", "none": "\033[90m", "special": "\033[36m", "end": "\033[0m"}


def run_data(
    data_config: Any,
    *,
    context_length: int,
    batch_size: int,
    seed: int,
    show: int = 0,
    log: Callable[[str], None] = print,
    stream: TextIO | None = None,
) -> dict[str, Any]:
    """Prepares the data of a config and prints what it is.

    Args:
      data_config: a DataConfig. context_length, batch_size, seed: as in training.
      show: training rows to print. log: takes lines for people. stream: where rows go (coloured on a terminal).

    Returns:
      Statistics, JSON-able.
    """
    data = prepare_data(data_config, context_length=context_length, batch_size=batch_size, seed=seed, log=log)
    stats = statistics(data)
    for split in ("train", "valid"):
        if data.tokens.get(split):
            log(
                f"{split.ljust(6)} {data.documents[split]:>9,} documents {data.bytes[split]:>14,} bytes "
                f"{data.tokens[split]:>13,} tokens  {stats[f'{split}_bytes_per_token']:.3f} bytes/token"
            )
    log(
        f"vocabulary {data.tokenizer.vocab_size:,} ({data.tokenizer.kind}), of which {stats['tokens_used']:,} occur; "
        f"specials: {', '.join(data.tokenizer.specials) or 'none'}"
    )
    log(f"validation text in bits per byte: {describe(stats['baselines']) or 'none held out'}")
    out = stream or sys.stdout
    if show:
        batch = data.train.rows(0, slice(0, min(show, data.train.batch_size(0))))
        for row in range(len(batch["tokens"])):
            print(show_row(data, {k: v[row] for k, v in batch.items()}, colour=out.isatty()), file=out)
    return stats


def statistics(data: Data) -> dict[str, Any]:
    """Returns documents, bytes, tokens, bytes per token, vocabulary in use, coverage and baselines."""
    used = np.zeros(data.tokenizer.vocab_size, bool)
    for name, split in data.splits.items():
        if name.rpartition("/")[2] == "train":
            for start in range(0, split.num_tokens, 1 << 20):
                used[np.unique(split.read(start, min(1 << 20, split.num_tokens - start)))] = True
    stats: dict[str, Any] = {
        "vocab_size": data.tokenizer.vocab_size,
        "tokens_used": int(used.sum()),
        "baselines": baselines(data),
        **data.info,
    }
    for split in ("train", "valid"):
        if data.tokens.get(split):
            stats[f"{split}_bytes_per_token"] = data.bytes[split] / data.tokens[split]
    return stats


def show_row(data: Data, row: dict[str, np.ndarray], colour: bool) -> str:
    """Returns a training row as text: targets by their loss weight, documents' ends visible.

    On a terminal: plain is weight 1, yellow a part, grey 0; special tokens cyan. Otherwise tokens of weight 0 stand in
    [brackets]. A bar marks where a new document begins.
    """
    pieces = _grouped(data, row)
    weights = row["target_weights"]
    title = f"--- {int((weights > 0).sum())} of {len(weights)} targets count"
    if "segment_ids" in row:
        title += f", {len(set(row['segment_ids'].tolist()) - {0})} documents"
    body = "".join(_paint(text, kind, colour) for text, kind in pieces)
    return f"{title}\n{body}"


def _grouped(data: Data, row: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """Joins neighbouring targets of one kind, so that characters of several tokens decode whole."""
    specials = set(data.tokenizer.specials.values())
    groups: list[tuple[list[int], str]] = []
    for token, weight in zip(row["targets"].tolist(), row["target_weights"].tolist(), strict=True):
        kind = "special" if token in specials else "full" if weight == 1 else "none" if weight == 0 else "part"
        if groups and groups[-1][1] == kind:
            groups[-1][0].append(token)
        else:
            groups.append(([token], kind))
    return [(_text(data, ids, kind), kind) for ids, kind in groups]


def _text(data: Data, ids: Sequence[int], kind: str) -> str:
    if kind != "special":
        return data.tokenizer.decode(ids)
    return data.tokenizer.decode(ids, specials="show") + "\n|"


def _paint(text: str, kind: str, colour: bool) -> str:
    if colour:
        return f"{_COLOURS[kind]}{text}{_COLOURS['end']}"
    return f"[{text}]" if kind == "none" else text
