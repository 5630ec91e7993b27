"""Building a token store: parallel, streaming, and resumable after a kill to the same bytes.

Documents are grouped into chunks by size alone. Workers tokenize chunks in any order; this process appends the results
in the order of the text and, after each chunk is on the disk, one line to a journal. A build that finds a journal cuts
the files back to its last line, skips the documents it covers and goes on. So neither the number of workers nor a kill
changes a byte of the result.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import queue
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from gpt_jax.data.cache import content_hash, file_sha256, locked
from gpt_jax.data.readers import Progress
from gpt_jax.data.store import ARRAYS, FORMAT, MANIFEST, SPLITS, Store, open_store
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.data.worker import Worker, encode_chunk
from gpt_jax.errors import UserError
from gpt_jax.files import atomic_write, clean_leftovers, explain_no_space, fsync_folder

CHUNK_SIZE = 1 << 21
# Below this a build is over before worker processes have started.
_SMALL = 8 << 20
_JOURNAL = "journal.jsonl"
_REPORT_SECONDS = 2.0

SplitDocument = tuple[str, str]


def build_store(
    documents: Iterable[SplitDocument],
    tokenizer: Tokenizer,
    out: str | pathlib.Path,
    *,
    workers: int = 0,
    fingerprint: dict[str, Any] | None = None,
    progress: Progress | None = None,
    chunk_size: int = CHUNK_SIZE,
    small: int = _SMALL,
    log: Callable[[str], None] | None = None,
) -> Store:
    """Tokenizes documents into the store `out`, or opens it if it is there.

    Args:
      documents: (split, text), always in the same order; read as a stream.
      tokenizer: kept in the store.
      out: the store's folder; while it is built its name ends in `.partial`.
      workers: processes that tokenize; 0 uses every core.
      fingerprint: identifies the documents; goes into the manifest. An unfinished build of others is begun anew.
      progress: what the reader of the documents has read, for the ETA.
      chunk_size: characters handed to a worker at a time.
      small: text up to so many bytes is tokenized here, without processes.
      log: takes lines for people: MB/s and ETA.

    Returns:
      The opened store; its bytes do not depend on `workers` or on interruptions.

    Raises:
      UserError: no text, no space left on the device.
    """
    out = pathlib.Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out, log):
        if not out.exists():
            partial = out.with_name(out.name + ".partial")
            with explain_no_space(partial, "the token store"):
                _build(
                    documents,
                    tokenizer,
                    partial,
                    workers,
                    fingerprint or {},
                    progress or Progress(),
                    chunk_size,
                    small,
                    log,
                )
                os.replace(partial, out)
                fsync_folder(out.parent)
    return open_store(out, tokenizer)


def _build(documents, tokenizer, folder, workers, fingerprint, progress, chunk_size, small, log) -> None:
    if (folder / MANIFEST).exists() and not (folder / _JOURNAL).exists():
        return  # killed just before the rename
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    plan = {"format": FORMAT, "tokenizer": tokenizer.hash, "dtype": dtype, "chunk": chunk_size, "corpus": fingerprint}
    with _Writer(folder, content_hash(plan), dtype) as writer:
        if writer.chunks and log:
            log(f"continuing a build of {sum(writer.totals['bytes'].values()) / 1e6:,.1f} MB of text")
        tokenizer.save(folder / "tokenizer")
        chunks = enumerate(_chunks(documents, chunk_size))
        skipped = writer.chunks
        todo = ((split_names, texts) for index, (split_names, texts) in chunks if index >= skipped)
        reporter = _Reporter(progress, sum(writer.totals["bytes"].values()), log)
        workers = workers or os.cpu_count() or 1
        for names, texts, (lengths, tokens) in _encoded(todo, tokenizer, folder / "tokenizer", dtype, workers, small):
            writer.append(names, [len(text.encode("utf-8")) for text in texts], lengths, tokens)
            reporter(sum(writer.totals["bytes"].values()))
        if not writer.totals["tokens"]["train"]:
            raise UserError("no document fell in the training split; lower data.valid_fraction.")
        reporter(sum(writer.totals["bytes"].values()), last=True)
        writer.finish(plan, tokenizer)


def _chunks(documents: Iterable[SplitDocument], limit: int) -> Iterator[tuple[list[str], list[str]]]:
    """Groups documents into (splits, texts) of at least `limit` characters (the last may have fewer)."""
    names, texts, size = [], [], 0
    for name, text in documents:
        names.append(name)
        texts.append(text)
        size += len(text)
        if size >= limit:
            yield names, texts
            names, texts, size = [], [], 0
    if texts:
        yield names, texts


def _encoded(todo, tokenizer, folder, dtype, workers, small):
    """Yields (splits, texts, encode_chunk(texts)) in order; starts processes only for more than `small` of text."""
    size = 0
    for names, texts in todo:
        if size >= small:
            break
        size += sum(map(len, texts))
        yield names, texts, encode_chunk(tokenizer, texts, dtype)
    else:
        return
    pool: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    started, pending = [], deque()

    def encode(texts: list[str]):
        worker = pool.get()
        try:
            return worker.encode(texts)
        finally:
            pool.put(worker)

    with contextlib.ExitStack() as stack:
        executor = ThreadPoolExecutor(workers)
        stack.callback(executor.shutdown, cancel_futures=True)
        for _ in range(workers):
            started.append(Worker(folder, dtype))
            stack.callback(started[-1].close)
            pool.put(started[-1])

        def submit(names, texts) -> tuple[list[str], list[str], Future]:
            return names, texts, executor.submit(encode, texts)

        pending.append(submit(names, texts))
        for names, texts in todo:
            pending.append(submit(names, texts))
            if len(pending) > workers + 1:
                names, texts, result = pending.popleft()
                yield names, texts, result.result()
        while pending:
            names, texts, result = pending.popleft()
            yield names, texts, result.result()


class _Writer:
    """The growing files of a store and the journal that says how far they are good."""

    def __init__(self, folder: pathlib.Path, plan: str, dtype: str):
        self._folder, self._plan = folder, plan
        self._itemsize = np.dtype(dtype).itemsize
        self.chunks, self.totals = 0, {k: dict.fromkeys(SPLITS, 0) for k in ("tokens", "documents", "bytes")}
        last = self._last_line()
        if last is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        else:
            self.chunks, self.totals = last["chunks"], last["totals"]
            clean_leftovers(folder)
            (folder / MANIFEST).unlink(missing_ok=True)  # killed between the manifest and the end of the journal
        self._files = {}
        self._journal = None

    def __enter__(self) -> _Writer:
        for split in SPLITS:
            for array in ARRAYS:
                file = open(self._folder / f"{split}.{array}", "ab")
                file.truncate(self._size(split, array, self.totals))
                self._files[split, array] = file
        if self.chunks == 0:
            atomic_write(self._folder / _JOURNAL, json.dumps({"plan": self._plan}) + "\n")
        self._journal = open(self._folder / _JOURNAL, "ab")
        return self

    def __exit__(self, *_) -> None:
        for file in (*self._files.values(), self._journal):
            with contextlib.suppress(OSError):  # a full disk has been told by the write that met it
                file.close()

    def _size(self, split: str, array: str, totals: dict[str, dict[str, int]]) -> int:
        return totals["tokens"][split] * self._itemsize if array == "tokens" else totals["documents"][split] * 8

    def _last_line(self) -> dict[str, Any] | None:
        """Returns the last journal line that the files bear out; None if there is nothing to go on from."""
        try:
            head, *lines = (self._folder / _JOURNAL).read_bytes().split(b"\n")
            if json.loads(head) != {"plan": self._plan}:
                return None
        except (OSError, ValueError):
            return None
        for line in reversed(lines):
            with contextlib.suppress(ValueError, KeyError, OSError, TypeError):
                entry = json.loads(line)
                if all(
                    (self._folder / f"{s}.{a}").stat().st_size >= self._size(s, a, entry["totals"])
                    for s in SPLITS
                    for a in ARRAYS
                ):
                    kept = lines[: lines.index(line) + 1]
                    atomic_write(self._folder / _JOURNAL, b"\n".join([head, *kept]) + b"\n")
                    return entry
        return None

    def append(self, names: list[str], sizes: list[int], lengths: np.ndarray, tokens: bytes) -> None:
        """Adds a chunk: splits, bytes and token counts [n] of its documents, and their tokens."""
        at = 0
        parts: dict[tuple[str, str], list[bytes]] = {key: [] for key in self._files}
        for name, size, length in zip(names, sizes, lengths.tolist(), strict=True):
            parts[name, "tokens"].append(tokens[at : at + length * self._itemsize])
            parts[name, "starts"].append(self.totals["tokens"][name].to_bytes(8, "little"))
            parts[name, "bytes"].append(size.to_bytes(8, "little"))
            at += length * self._itemsize
            self.totals["tokens"][name] += length
            self.totals["documents"][name] += 1
            self.totals["bytes"][name] += size
        for key, file in self._files.items():
            if parts[key]:
                file.write(b"".join(parts[key]))
                file.flush()
                os.fsync(file.fileno())
        self.chunks += 1
        self._journal.write(json.dumps({"chunks": self.chunks, "totals": self.totals}).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def finish(self, plan: dict[str, Any], tokenizer: Tokenizer) -> None:
        """Writes the manifest; the journal goes."""
        for file in (*self._files.values(), self._journal):
            file.close()
        files = sorted(p for p in self._folder.rglob("*") if p.is_file() and p.name != _JOURNAL)
        manifest = {
            **plan,
            "tokenizer_kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "eot": tokenizer.eot,
            "splits": {s: {k: self.totals[k][s] for k in self.totals} for s in SPLITS},
            "files": {
                str(p.relative_to(self._folder)): {"size": p.stat().st_size, "sha256": file_sha256(p)} for p in files
            },
        }
        atomic_write(self._folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        (self._folder / _JOURNAL).unlink()


class _Reporter:
    """Says every two seconds how much text is tokenized, how fast, and how long the rest will take."""

    def __init__(self, progress: Progress, before: int, log: Callable[[str], None] | None):
        self._progress, self._before, self._log = progress, before, log
        self._start = self._last = time.monotonic()
        self._first_done: int | None = None

    def __call__(self, size: int, last: bool = False) -> None:
        now = time.monotonic()
        if self._first_done is None:
            self._first_done = self._progress.done
        if self._log is None or (not last and now - self._last < _REPORT_SECONDS):
            return
        self._last, seconds = now, max(now - self._start, 1e-6)
        rate = (size - self._before) / seconds
        line = f"tokenized {size / 1e6:,.1f} MB of text  {rate / 1e6:.2f} MB/s"
        done, total = self._progress.done, self._progress.total
        if not last and total and done > self._first_done:
            eta = seconds * max(0, total - done) / (done - self._first_done)
            line += f"  {min(1.0, done / total):.0%}  eta {eta:,.0f} s"
        self._log(line)
