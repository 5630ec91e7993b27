"""From the data config to training and validation batches: corpora, tokenizer and stores, kept in the cache."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.data import cache
from gpt_jax.data.batches import BatchOrder, TextSource, ValidSource
from gpt_jax.data.build import build_store
from gpt_jax.data.mixture import MixtureSource
from gpt_jax.data.permutation import mix
from gpt_jax.data.readers import Progress, expand_variables
from gpt_jax.data.rows import make_rows
from gpt_jax.data.store import Split, is_store, is_token_file, open_store, open_token_file
from gpt_jax.data.texts import Corpora, Log, Text, texts_of
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.data.tokenizer_choice import open_tokenizer
from gpt_jax.errors import UserError, choose

LAYOUTS = ("packed", "padded", "bins")
_VERSION = 1  # of the stores: a change of their format or content raises it


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run needs of its data.

    Attributes:
      tokenizer: of all texts.
      train: training batches by step.
      valid: validation batches: {"valid": ...}, or one per source of a mixture under its name; empty if nothing is
        held out.
      bytes, tokens, documents: per split ("train", "valid"; of a mixture also "NAME/train", ...): bytes of the
        original text; tokens with EOTs.
      info: JSON-able: per text its fingerprint and store, and the tokenizer's hash.
      splits: the tokens themselves, under the names of `bytes` (of a mixture only "NAME/train", ...).
    """

    tokenizer: Tokenizer
    train: Any
    valid: dict[str, ValidSource]
    bytes: dict[str, int]
    tokens: dict[str, int]
    documents: dict[str, int]
    info: dict[str, Any]
    splits: dict[str, Split]


def prepare_data(
    data: Any,
    *,
    context_length: int,
    batch_size: int,
    seed: int,
    eval_batch_size: int = 0,
    batch_schedule: Sequence[tuple[int, int]] = (),
    cache_dir: str | pathlib.Path | None = None,
    log: Log | None = print,
) -> Data:
    """Trains or loads the tokenizer, builds or opens the token stores, and returns the batches.

    Args:
      data: a DataConfig.
      context_length: T, tokens of a row.
      batch_size: rows of the global batch.
      seed: of the order of the rows, unless data.seed is set.
      eval_batch_size: rows of a validation batch; 0 is batch_size.
      batch_schedule: ((until batch index, rows), ...) of `resolve_batch_schedule`.
      cache_dir: where tokenizers and stores are kept; default $GPT_JAX_CACHE, else ~/.cache/gpt_jax.
      log: takes lines for people; None is silent.

    Raises:
      UserError: whatever is wrong with the config, the files or the cache, in one line.
    """
    choose("data.layout", data.layout, LAYOUTS)
    seed = data.seed if data.seed >= 0 else seed
    order = BatchOrder(batch_size, tuple(map(tuple, batch_schedule)), tuple(map(tuple, data.skip)))
    texts, mixed = texts_of(data), bool(data.sources)
    root = cache.cache_root(cache_dir)
    tokenizer, opened = open_texts(data.tokenizer, texts, root, data.workers, log)

    makers, splits, valid = [], {}, {}
    for k, (text, (found, _)) in enumerate(zip(texts, opened, strict=True)):
        if "train" not in found:
            raise UserError(f"{text.label} has no training text.")
        makers.append(make_rows(found["train"], context_length, data.layout, data.doc_mask, mix(seed, k, 5)))
        for name, split in found.items():
            splits[f"{text.name}/{name}" if mixed else name] = split
        if "valid" in found:
            rows = make_rows(found["valid"], context_length, data.layout, data.doc_mask, None)
            size = eval_batch_size or batch_size
            valid[text.name if mixed else "valid"] = ValidSource(found["valid"], rows, size, tokenizer)
    if mixed:
        train = MixtureSource(makers, [t.weight for t in texts], [t.name for t in texts], order, seed)
    else:
        train = TextSource(makers[0], order, seed, texts[0].label)

    counts = {
        what: _with_totals({name: getattr(split, f"num_{what}") for name, split in splits.items()}, mixed)
        for what in ("bytes", "tokens", "documents")
    }
    info = {
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash},
        "texts": {t.name: entry for t, (_, entry) in zip(texts, opened, strict=True)},
        **counts,
    }
    return Data(tokenizer, train, valid, **counts, info=info, splits=splits)


def _with_totals(counts: Mapping[str, int], mixed: bool) -> dict[str, int]:
    totals = {s: sum(n for name, n in counts.items() if name.rpartition("/")[2] == s) for s in ("train", "valid")}
    return totals | (dict(counts) if mixed else {})


def open_texts(
    config: Any, texts: Sequence[Text], root: pathlib.Path, workers: int, log: Log | None
) -> tuple[Tokenizer, list[tuple[dict[str, Split], dict[str, Any]]]]:
    """Returns the tokenizer and per text (its splits, what identifies it)."""
    say = log or (lambda line: None)
    prebuilt = [_is_prebuilt(t.path) for t in texts]
    corpora = [None if p else Corpora(t, root) for t, p in zip(texts, prebuilt, strict=True)]
    tokenizer = open_tokenizer(config, texts, corpora, root, say)
    opened = []
    for text, corpus in zip(texts, corpora, strict=True):
        if corpus is None:
            opened.append(_open_prebuilt(text, tokenizer, root))
        else:
            key = cache.content_hash([_VERSION, corpus.identity, tokenizer.hash])
            path = root / "stores" / key
            if not path.exists():
                say(f"tokenizing {text.label} with {tokenizer.kind} ({tokenizer.vocab_size} tokens) into {path}")
            progress = Progress()
            store = build_store(
                corpus.split_documents(progress, say),
                tokenizer,
                path,
                workers=workers,
                fingerprint=corpus.identity,
                progress=progress,
                log=log,
            )
            opened.append((store.splits, {"store": str(path), **corpus.identity}))
    return tokenizer, opened


def _is_prebuilt(path: str) -> bool:
    return bool(path) and (is_token_file(path) or is_store(expand_variables(path)))


def _open_prebuilt(text: Text, tokenizer: Tokenizer, root: pathlib.Path) -> tuple[dict[str, Split], dict[str, Any]]:
    path = expand_variables(text.path)
    if is_store(path):
        store = open_store(path, tokenizer)
        return store.splits, {"store": path, **store.manifest["corpus"]}
    splits = {"train": open_token_file(path, tokenizer, root / "corpora")}
    if text.valid_path:
        if not is_token_file(text.valid_path):
            raise UserError(f"data.path is a token file, so data.valid_path must be one, not {text.valid_path!r}.")
        splits["valid"] = open_token_file(expand_variables(text.valid_path), tokenizer, root / "corpora")
    return splits, {"tokens_file": path, "tokens": splits["train"].num_tokens}
