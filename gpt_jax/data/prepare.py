"""From the data config to training and validation batches: corpora, tokenizer and stores, kept in the cache."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt_jax.config_ranges import LAYOUTS
from gpt_jax.data import cache
from gpt_jax.data.batches import BatchOrder, TrainSource, ValidSource, ValidText, batch_spec
from gpt_jax.data.build import build_store
from gpt_jax.data.formats import Part
from gpt_jax.data.mixture import MixtureSource
from gpt_jax.data.permutation import mix
from gpt_jax.data.readers import Progress, expand_variables
from gpt_jax.data.rows import arrays_of, make_rows
from gpt_jax.data.store import Split, is_store, is_token_file, open_store, open_token_file
from gpt_jax.data.texts import Corpora, Log, Text, texts_of
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.data.tokenizer_choice import open_tokenizer
from gpt_jax.errors import UserError, choose, nearest

_OF_ALL = ("tokenizer", "prefetch")  # data keys that the parts of a mixture share
_VERSION = 1  # of the stores: a change of their format or content raises it


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run needs of its data.

    Attributes:
      tokenizer: of all texts.
      train: training batches by step.
      valid: validation batches: {"valid": ...}, or several under their names: the sources of a mixture of texts, tasks,
        and the parts of a mixture of objectives ("PART", or "PART/NAME" if it has several); empty if nothing is held
        out.
      bytes, tokens, documents: per split ("train", "valid"; of a mixture also "NAME/train", ...): bytes of the
        original text; tokens with EOTs.
      info: JSON-able: per text its fingerprint and store, per task its examples, and the tokenizer's hash.
      splits: the tokens themselves, under the names of `bytes` (of a mixture only "NAME/train", ...).
      tasks: what the objective may know of its tasks; for a mixture of objectives by part.
    """

    tokenizer: Tokenizer
    train: Any
    valid: dict[str, ValidSource]
    bytes: dict[str, int]
    tokens: dict[str, int]
    documents: dict[str, int]
    info: dict[str, Any]
    splits: dict[str, Split]
    tasks: Any = ()

    def fingerprint(self) -> str:
        """Returns 16 hex digits of what the data are, wherever a host keeps them."""
        return cache.content_hash(_without_places(self.info))


def _without_places(info: Any) -> Any:
    if not isinstance(info, Mapping):
        return info
    return {key: _without_places(value) for key, value in info.items() if key not in ("store", "tokens_file")}


def prepare_data(
    data: Any,
    *,
    context_length: int,
    batch_size: int,
    seed: int,
    rows: Callable[[Tokenizer], Any] | None = None,
    eval_batch_size: int = 0,
    batch_schedule: Sequence[tuple[int, int]] = (),
    tokenizer: Tokenizer | None = None,
    cache_dir: str | pathlib.Path | None = None,
    log: Log | None = print,
) -> Data:
    """Trains or loads the tokenizer, builds or opens the token stores, and returns the batches.

    Args:
      data: a DataConfig.
      context_length: T, tokens of a row.
      batch_size: rows of the global batch.
      seed: of the order of the rows, unless data.seed is set.
      rows: of the tokenizer, how the objective wants its rows (see `formats`): None (plain text), TextRows, ExampleRows
        or {part: Part}.
      eval_batch_size: rows of a validation batch; 0 is batch_size.
      batch_schedule: ((until batch index, rows), ...) of `resolve_batch_schedule`.
      tokenizer: of a run that was begun; None: the one that data.tokenizer asks for.
      cache_dir: where tokenizers and stores are kept; default $GPT_JAX_CACHE, else ~/.cache/gpt_jax.
      log: takes lines for people; None is silent.

    Raises:
      UserError: whatever is wrong with the config, the files or the cache, in one line.
    """
    choose("data.layout", data.layout, LAYOUTS)
    place = _Place(
        context_length,
        eval_batch_size or batch_size,
        data.seed if data.seed >= 0 else seed,
        tuple(map(tuple, batch_schedule)),
        cache.cache_root(cache_dir),
        log or (lambda line: None),
    )
    texts = texts_of(data)
    if tokenizer is None:
        tokenizer = open_tokenizer(data.tokenizer, texts, _corpora(texts, place.root), place.root, place.log)
    wanted = rows(tokenizer) if rows is not None else None
    if not isinstance(wanted, Mapping):
        return _prepare(data, wanted, tokenizer, batch_size, place)
    if batch_schedule:
        raise UserError("batch_schedule goes with one objective, not with a mixture of several.")
    parts = {}
    for name, part in wanted.items():
        parts[name] = _prepare(_own_data(data, name, part), part.rows, tokenizer, part.batch_size, place, name)
    return _joined(tokenizer, parts)


def tasks_of(data: Any, rows: Any, part: str = "") -> Any:
    """Returns what `Data.tasks` of these rows will be, without a tokenizer and without reading an example.

    Args:
      data: a DataConfig. rows: how the objective wants its rows, see `prepare_data`. part: of a mixture.

    Raises:
      UserError: a task that cannot be had; one whose labels are those of a file that is not there.
    """
    if isinstance(rows, Mapping):
        return {name: tasks_of(_own_data(data, name, own), own.rows, name) for name, own in rows.items()}
    if not hasattr(rows, "encode"):
        return ()
    from gpt_jax.data.task_rows import load_tasks

    return load_tasks(data.tasks, rows.kind, f" {part!r}" if part else "")[1]


def spec_of(data: Any, rows: Any, batch_size: int, context_length: int) -> Any:
    """Returns what `Data.train.spec()` of these rows will be, without a tokenizer and without reading anything.

    Args:
      data: a DataConfig. rows: how the objective wants its rows, see `prepare_data`. batch_size: of the global batch.
    """
    if isinstance(rows, Mapping):
        parts = {name: (_own_data(data, name, own), own) for name, own in rows.items()}
        return {name: spec_of(its, own.rows, own.batch_size, context_length) for name, (its, own) in parts.items()}
    if hasattr(rows, "encode"):
        from gpt_jax.data.task_rows import example_arrays

        return batch_spec(batch_size, example_arrays(rows, context_length))
    return batch_spec(batch_size, arrays_of(context_length, data.layout, data.doc_mask, rows))


def _own_data(data: Any, name: str, part: Part) -> Any:
    """The data config of a part of a mixture of objectives."""
    for key in part.data:
        if key in _OF_ALL:
            raise UserError(f"the data of part {name!r} has key {key!r}, which all parts share: set data.{key}.")
        if not hasattr(data, key):
            allowed = [f.name for f in dataclasses.fields(data) if f.name not in _OF_ALL]
            raise UserError(f"the data of part {name!r} has key {key!r}{nearest(key, allowed)}, not one of data's.")
    return dataclasses.replace(data, **part.data)


@dataclasses.dataclass(frozen=True)
class _Place:
    """What all parts of a run's data share: the seed is of those that have none of their own."""

    context_length: int
    eval_batch_size: int
    seed: int
    schedule: tuple[tuple[int, int], ...]
    root: pathlib.Path
    log: Log


def _prepare(data: Any, rows: Any, tokenizer: Tokenizer, batch_size: int, place: _Place, part: str = "") -> Data:
    """The data of one objective."""
    choose("data.layout", data.layout, LAYOUTS)
    order = BatchOrder(batch_size, place.schedule, tuple(map(tuple, data.skip)))
    place = dataclasses.replace(place, seed=data.seed if data.seed >= 0 else place.seed)
    if hasattr(rows, "encode"):
        return _prepare_tasks(data, rows, tokenizer, order, place, part)
    if data.tasks:
        what = f"the objective {part!r}" if part else "the objective"
        raise UserError(f"data.tasks is {data.tasks!r}, but {what} reads text; leave it empty.")
    length, seed, texts = place.context_length, place.seed, texts_of(data)
    mixed = bool(data.sources)
    opened = open_texts(texts, tokenizer, place.root, data.workers, place.log)
    makers, splits, valid = [], {}, {}
    for k, (text, (found, _)) in enumerate(zip(texts, opened, strict=True)):
        if "train" not in found:
            raise UserError(f"{text.label} has no training text.")
        makers.append(make_rows(found["train"], length, data.layout, data.doc_mask, mix(seed, k, 5), rows))
        for name, split in found.items():
            splits[f"{text.name}/{name}" if mixed else name] = split
        if "valid" in found:
            maker = make_rows(found["valid"], length, data.layout, data.doc_mask, None, rows)
            size = place.eval_batch_size
            plain = rows is None
            name = text.name if mixed else "valid"
            valid[name] = (
                ValidText(found["valid"], maker, size, tokenizer, part) if plain else ValidSource(maker, size, part)
            )
    if mixed:
        train = MixtureSource(makers, [t.weight for t in texts], [t.name for t in texts], order, seed)
    else:
        train = TrainSource(makers[0], order, seed, texts[0].label)

    counts = {
        what: _with_totals({name: getattr(split, f"num_{what}") for name, split in splits.items()}, mixed)
        for what in ("bytes", "tokens", "documents")
    }
    info = {
        "tokenizer": tokenizer_info(tokenizer),
        "texts": {t.name: entry for t, (_, entry) in zip(texts, opened, strict=True)},
        **counts,
    }
    return Data(tokenizer, train, valid, **counts, info=info, splits=splits)


def _prepare_tasks(data: Any, rows: Any, tokenizer: Tokenizer, order: BatchOrder, place: _Place, part: str) -> Data:
    from gpt_jax.data.task_rows import task_sources

    train, valid, infos, counts = task_sources(
        data,
        rows,
        tokenizer,
        length=place.context_length,
        order=order,
        eval_batch_size=place.eval_batch_size,
        seed=place.seed,
        part=part,
        log=place.log,
    )
    if len(infos) == 1:
        valid = dict(zip(("valid",), valid.values(), strict=False))
    info = {"tokenizer": tokenizer_info(tokenizer), "tasks": counts}
    return Data(tokenizer, train, valid, {}, {}, {}, info=info, splits={}, tasks=infos)


def _joined(tokenizer: Tokenizer, parts: Mapping[str, Data]) -> Data:
    """The data of a mixture of objectives: everything by part."""

    def named(what: str) -> dict[str, Any]:
        return {f"{p}/{name}": value for p, data in parts.items() for name, value in getattr(data, what).items()}

    valid = {name.removesuffix("/valid"): source for name, source in named("valid").items()}
    info = {"tokenizer": tokenizer_info(tokenizer), "parts": {p: data.info for p, data in parts.items()}}
    return Data(
        tokenizer,
        PartsSource({p: data.train for p, data in parts.items()}),
        valid,
        named("bytes"),
        named("tokens"),
        named("documents"),
        info=info,
        splits=named("splits"),
        tasks={p: data.tasks for p, data in parts.items()},
    )


class PartsSource:
    """Batches of a mixture of objectives: a sub-batch per part, each a source of its own."""

    def __init__(self, parts: Mapping[str, Any]):
        self.parts = dict(parts)

    @property
    def rows_per_epoch(self) -> int:
        return sum(part.rows_per_epoch for part in self.parts.values())

    def spec(self) -> dict[str, Any]:
        return {name: part.spec() for name, part in self.parts.items()}

    def batch_size(self, step: int) -> int:
        return sum(part.batch_size(step) for part in self.parts.values())


def tokenizer_info(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash}


def _with_totals(counts: Mapping[str, int], mixed: bool) -> dict[str, int]:
    totals = {s: sum(n for name, n in counts.items() if name.rpartition("/")[2] == s) for s in ("train", "valid")}
    return totals | (dict(counts) if mixed else {})


def _corpora(texts: Sequence[Text], root: pathlib.Path) -> list[Corpora | None]:
    return [None if _is_prebuilt(text.path) else Corpora(text, root) for text in texts]


def open_texts(
    texts: Sequence[Text], tokenizer: Tokenizer, root: pathlib.Path, workers: int, log: Log
) -> list[tuple[dict[str, Split], dict[str, Any]]]:
    """Returns per text (its splits, what identifies it); builds the stores that are not in the cache."""
    opened = []
    for text, corpus in zip(texts, _corpora(texts, root), strict=True):
        if corpus is None:
            opened.append(_open_prebuilt(text, tokenizer, root))
        else:
            key = cache.content_hash([_VERSION, corpus.identity, tokenizer.hash])
            path = root / "stores" / key
            if not path.exists():
                log(f"tokenizing {text.label} with {tokenizer.kind} ({tokenizer.vocab_size} tokens) into {path}")
            progress = Progress()
            store = build_store(
                corpus.split_documents(progress, log),
                tokenizer,
                path,
                workers=workers,
                fingerprint=corpus.identity,
                progress=progress,
                log=log,
            )
            opened.append((store.splits, {"store": str(path), **corpus.identity}))
    return opened


def _is_prebuilt(path: str) -> bool:
    return bool(path) and (is_token_file(path) or is_store(expand_variables(path)))


def _open_prebuilt(text: Text, tokenizer: Tokenizer, root: pathlib.Path) -> tuple[dict[str, Split], dict[str, Any]]:
    path = expand_variables(text.path)
    if is_store(path):
        if text.valid_path:
            raise UserError(
                f"data.path is a token store, which has its own validation text; empty data.valid_path, which is "
                f"{text.valid_path!r}, or give the text itself as data.path."
            )
        store = open_store(path, tokenizer)
        return store.splits, {"store": path, **store.manifest["corpus"]}
    splits = {"train": open_token_file(path, tokenizer, root / "corpora")}
    if text.valid_path:
        if not is_token_file(text.valid_path):
            raise UserError(f"data.path is a token file, so data.valid_path must be one, not {text.valid_path!r}.")
        splits["valid"] = open_token_file(expand_variables(text.valid_path), tokenizer, root / "corpora")
    hashes = {f"{name}_sha256": split.sha256 for name, split in splits.items()}
    return splits, {"tokens_file": path, "tokens": splits["train"].num_tokens, **hashes}
