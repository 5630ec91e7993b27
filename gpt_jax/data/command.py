"""`gpt-jax data`: prepare the data of a config, say what it is, and show training rows."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from gpt_jax.data.baselines import baselines, describe, token_counts
from gpt_jax.data.prepare import Data, prepare_data
from gpt_jax.data.texts import Log
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.data.vocabulary import coverage_of_counts

_TOP = (100, 1000, 10_000)


def run_data(
    data: Any,
    *,
    context_length: int,
    batch_size: int,
    seed: int,
    rows: Callable[[Tokenizer], Any] | None = None,
    show: int = 0,
    tokenizer: Tokenizer | None = None,
    cache_dir: str | pathlib.Path | None = None,
    log: Log | None = print,
    stream: TextIO | None = None,
) -> dict[str, Any]:
    """Trains the tokenizer, builds the stores, prints statistics and `show` training rows.

    Args:
      data: a DataConfig; the others as `prepare_data`.
      show: rows of the first batches to print.
      stream: where to print; standard output if None.

    Returns:
      The statistics, JSON-able: what the command prints as its last line.
    """
    stream = stream or sys.stdout
    prepared = prepare_data(
        data,
        context_length=context_length,
        batch_size=batch_size,
        seed=seed,
        rows=rows,
        tokenizer=tokenizer,
        cache_dir=cache_dir,
        log=log,
    )
    report = statistics(prepared)
    print(table(report), file=stream)
    if show:
        print_rows(prepared, show, stream)
    return report


def statistics(data: Data) -> dict[str, Any]:
    """Returns vocabulary, corpora, baselines and, per split, documents, bytes, tokens, bytes per token and coverage."""
    splits = {}
    for name, split in data.splits.items():
        counts = token_counts(split, data.tokenizer.vocab_size)
        splits[name] = {
            "documents": split.num_documents,
            "eots": int(counts[data.tokenizer.eot]) if data.tokenizer.eot is not None else 0,
            **coverage_of_counts(data.tokenizer, counts, split.num_bytes, [k for k in _TOP if k < len(counts)]),
        }
    return {
        **data.info,
        "rows_per_epoch": data.train.rows_per_epoch,
        "splits": splits,
        "baselines": baselines(data),
    }


def table(report: dict[str, Any]) -> str:
    """Returns the statistics for people."""
    tokenizer = report["tokenizer"]
    lines = [f"tokenizer    {tokenizer['kind']}, {tokenizer['vocab_size']} tokens, {tokenizer['hash'][:12]}"]
    for name, tasks in report.get("tasks", {}).items():
        counts = {s: {what: n for what, n in found.items() if what != "sha256"} for s, found in tasks.items()}
        parts = ", ".join(f"{s} {' '.join(f'{n:,} {what}' for what, n in c.items())}" for s, c in counts.items())
        lines.append(f"task         {name}: {parts}")
    for name, text in report.get("texts", {}).items():
        corpus = text.get("corpus", {})
        what = corpus if isinstance(corpus, str) else corpus.get("corpus", "tokens")
        lines.append(f"text         {name}: {what}, in {text.get('store') or text.get('tokens_file')}")
    head = f"{'split':<20}{'documents':>12}{'bytes':>16}{'tokens':>16}{'bytes/token':>13}{'covered':>10}{'used':>8}"
    lines += ["", head] if report["splits"] else []
    for name, s in report["splits"].items():
        lines.append(
            f"{name:<20}{s['documents']:>12,}{s['bytes']:>16,}{s['tokens']:>16,}{s['bytes_per_token']:>13.3f}"
            f"{s['covered']:>10.4%}{s['used']:>8,}"
        )
        if "unk" in s:
            lines.append(f"{'':<20}{s['unk']:>12,} <unk>, each worth {s['unk_nats']:.3f} nats more")
    for k in next(iter(report["splits"].values()), {"top": ()})["top"]:
        parts = ", ".join(f"{name} {s['top'][k]:.2%}" for name, s in report["splits"].items())
        lines.append(f"the {k:,} most frequent tokens are: {parts}")
    lines.append(f"rows of an epoch: {report['rows_per_epoch']:,}")
    lines.append(f"validation text in bits per byte: {describe(report['baselines']) or 'none held out'}")
    return "\n".join(lines)


def print_rows(data: Data, count: int, stream: TextIO) -> None:
    """Prints the first `count` training rows as they reach the model.

    A token is green if it is predicted with weight 1, yellow with another weight, red if it is not predicted (weight
    0), and the row's first token, which nothing in the row predicts, is dim; padding is left out and counted.
    Documents begin on a new line with their number in the row. Without a terminal, tokens of weight 0 stand in
    [brackets].
    """
    for part, source in getattr(data.train, "parts", {"": data.train}).items():
        step = shown = 0
        while shown < count:
            batch = source.rows(step, slice(0, min(count - shown, source.batch_size(step))))
            for row in range(len(batch["tokens"])):
                print(f"\n--- {part}{', ' if part else ''}step {step}, row {row} " + "-" * 60, file=stream)
                print(format_row({k: v[row] for k, v in batch.items()}, data.tokenizer, stream.isatty()), file=stream)
            shown += len(batch["tokens"])
            step += 1


def format_row(row: dict[str, np.ndarray], tokenizer: Tokenizer, colour: bool) -> str:
    """Returns a row [T] as text; see `print_rows`."""
    if "targets" not in row:
        return _format_fields(row, tokenizer)
    length = len(row["tokens"])
    segments = row.get("segment_ids")
    if segments is None:  # documents are visible by their EOT alone
        segments = 1 + np.cumsum(row["tokens"] == tokenizer.eot) if tokenizer.eot is not None else np.ones(length, int)
        segments -= segments[0] - 1
    used = int((segments > 0).sum())
    # The weight that token t was predicted with is that of target t - 1, if that is token t.
    predicted = row["targets"][: used - 1] == row["tokens"][1:used]
    weights: list[float | None] = [None]
    weights += [w if p else None for w, p in zip(row["target_weights"].tolist(), predicted.tolist(), strict=False)]
    out: list[str] = []
    start = 0
    while start < used:
        same_document = segments[start:used] == segments[start]
        end = start + int(same_document.argmin()) if not same_document.all() else used
        out.append(f"[{segments[start]}] " + _runs(row["tokens"][start:end], weights[start:end], tokenizer, colour))
        start = end
    last = row["targets"][used - 1]
    tail = f"-> {tokenizer.decode([last], specials='show')!r} (weight {row['target_weights'][used - 1]:g})"
    if used < length:
        tail += f", {length - used} padding"
    return "\n".join([*out, tail])


def _format_fields(row: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> str:
    """A row whose tokens are not predicted one from another: its text, then whatever else it holds."""
    lines = []
    used = np.atleast_2d(row["segment_ids"]) > 0
    for tokens, here in zip(np.atleast_2d(row["tokens"]), used, strict=True):
        lines.append(tokenizer.decode(tokens[here], specials="show"))
    for name, values in row.items():
        if name not in ("tokens", "segment_ids", "positions"):
            shown = values[used[0]] if np.ndim(values) and np.shape(values) == np.shape(used[0]) else values
            lines.append(f"{name}: {np.array2string(np.asarray(shown), threshold=40, precision=3)}")
    return "\n".join(lines)


def _runs(tokens: np.ndarray, weights: Sequence[float | None], tokenizer: Tokenizer, colour: bool) -> str:
    """Joins tokens of equal weight; a character spelled in several tokens stays whole, in the colour of its first."""
    out, start = [], 0
    for end in range(1, len(tokens) + 1):
        inside = end < len(tokens) and 0x80 <= (tokenizer.token_bytes(int(tokens[end])) or b"\0")[0] < 0xC0
        if inside or (end < len(tokens) and weights[end] == weights[start]):
            continue
        text, weight = tokenizer.decode(tokens[start:end], specials="show"), weights[start]
        if colour:
            code = "2" if weight is None else "31" if weight == 0 else "32" if weight == 1 else "33"
            out.append(f"\x1b[{code}m{text}\x1b[0m")
        else:
            out.append(f"[{text}]" if weight == 0 else text)
        start = end
    return "".join(out)
