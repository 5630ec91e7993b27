"""Reading documents from files: .txt .jsonl .tsv .csv .parquet, plain or .gz .xz .zst, streaming."""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import glob
import gzip
import io
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Iterator

from gpt_jax.data.cache import cache_root
from gpt_jax.errors import UserError
from gpt_jax.remote import fetch_file, is_url

COMPRESSIONS = (".gz", ".xz", ".zst")
FORMATS = (".txt", ".jsonl", ".tsv", ".csv", ".parquet")
# A .txt file is one document, but is cut after so many bytes, at a line end or, where there is none, within the line:
# memory must not grow with the file.
LARGEST_DOCUMENT = 8 << 20

Document = tuple[str, str]


@dataclasses.dataclass
class Progress:
    """How far a reader is in its files, in bytes as stored on disk."""

    done: int = 0
    total: int = 0


def expand_variables(path: str) -> str:
    """Expands ~ and $VARS; raises UserError naming a variable that is not set."""
    out = os.path.expandvars(os.path.expanduser(path.strip()))
    if "$" in out:
        name = out[out.index("$") + 1 :].split("/")[0].strip("{}")
        raise UserError(f"path {path!r} needs the environment variable {name}, which is not set.")
    return out


def refuse_globs(url: str) -> None:
    """Raises UserError for a pattern of URLs."""
    if any(letter in url for letter in "*?["):
        raise UserError(f"data path {url!r}: globs are of files here; name each object of an object store.")


def local_path(path: str) -> pathlib.Path:
    """Returns a path with ~ and $VARS expanded; in place of each URL (of several, between commas) a copy in the cache.

    Raises:
      UserError: a $VAR that is not set, an object that is not there.
    """
    expanded = expand_variables(path)
    if "://" not in expanded:
        return pathlib.Path(expanded)
    parts = (part.strip() for part in expanded.split(","))
    return pathlib.Path(",".join(str(fetch_file(p, cache_root(), print)) if is_url(p) else p for p in parts))


def expand_paths(paths: str) -> list[pathlib.Path]:
    """Returns the files that comma-separated paths and globs name, sorted within each glob, each file once.

    Raises:
      UserError: a $VAR that is not set, a path that names no file, a folder.

    An object of an object store is copied into the cache.
    """
    files: dict[pathlib.Path, None] = {}
    for part in filter(None, (p.strip() for p in paths.split(","))):
        pattern = expand_variables(part)
        if is_url(pattern):
            refuse_globs(pattern)
            files[fetch_file(pattern, cache_root(), print)] = None
            continue
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        found = [pathlib.Path(f) for f in found]
        if not found:
            raise UserError(f"data path {part!r}: no such file.")
        for file in found:
            if file.is_dir():
                raise UserError(f"data path {str(file)!r} is a folder; name its files, such as '{file}/*.jsonl.zst'.")
            files[file] = None
    if not files:
        raise UserError("the data path names no file.")
    return list(files)


def file_format(path: pathlib.Path) -> tuple[str, str]:
    """Returns (format, compression) of a file by its name; raises UserError naming the allowed ones."""
    suffixes = [s.lower() for s in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = suffixes[-1] if suffixes else ""
    if kind not in FORMATS:
        raise UserError(
            f"{path}: cannot tell its format; allowed: {' '.join(FORMATS)}, "
            f"plain or followed by {' '.join(COMPRESSIONS)}."
        )
    if kind == ".parquet" and compression:
        raise UserError(f"{path}: a parquet file compresses itself; remove the {compression}.")
    return kind, compression


def read_documents(path: pathlib.Path, text_key: str = "text", progress: Progress | None = None) -> Iterator[Document]:
    """Yields (id, text) of one file, streaming.

    .txt: the file is one document. .jsonl: an object a line, text under `text_key`, id under 'id' if there is one.
    .csv, .tsv: a header names the columns; without one `text_key` is a column number from 0. .parquet: a column.

    Raises:
      UserError: naming file and line of what is malformed, or the damaged file.
    """
    kind, _ = file_format(path)
    progress = progress or Progress()
    if kind == ".parquet":
        with named_damage(path):
            yield from _read_parquet(path, text_key, progress)
        return
    read = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv, ".tsv": _read_csv}[kind]
    with open_stream(path, progress) as stream:
        yield from read(path, stream, text_key)


@contextlib.contextmanager
def open_stream(path: pathlib.Path, progress: Progress | None = None) -> Iterator[io.BufferedIOBase]:
    """Opens a file as binary, decompressed if its name ends in .gz, .xz or .zst, behind a UTF-8 byte order mark.

    Raises:
      UserError: the file cannot be read or is damaged, here or while the block reads on.
    """
    with named_damage(path), open(path, "rb") as raw:
        compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
        with _decompress(_Counted(raw, progress or Progress()), compression) as stream:
            if stream.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
                stream.read(len(codecs.BOM_UTF8))
            yield stream


def read_lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line with its end) of a UTF-8 file, decompressed; errors as `open_stream`."""
    with open_stream(path) as stream:
        yield from _lines(path, stream)


@contextlib.contextmanager
def named_damage(path: pathlib.Path) -> Iterator[None]:
    """Raises UserError where the block cannot read the file or finds it damaged."""
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        compression = path.suffix.lower()
        raise UserError(f"{path}: damaged or truncated {compression} file ({error}).") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror or error}).") from None


class _Counted(io.RawIOBase):
    """A raw file that adds what is read to a Progress."""

    def __init__(self, raw, progress: Progress):
        self._raw, self._progress = raw, progress

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._raw.readinto(buffer)
        self._progress.done += count or 0
        return count


def _decompress(raw: io.RawIOBase, compression: str):
    buffered = io.BufferedReader(raw, 1 << 18)
    if compression == ".gz":
        return gzip.GzipFile(fileobj=buffered)
    if compression == ".xz":
        return lzma.LZMAFile(buffered)
    if compression == ".zst":
        return io.BufferedReader(_Zstd(buffered), 1 << 18)
    return buffered


class _Zstd(io.RawIOBase):
    """A zstd stream (any number of frames) as a raw file; a frame cut short is an EOFError."""

    def __init__(self, source):
        import zstandard

        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._error = zstandard.ZstdError
        self._source, self._frame, self._rest, self._out = source, None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._out:
            data = self._rest or self._source.read(1 << 18)
            self._rest = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the last frame is cut short")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._out = self._frame.decompress(data)
            except self._error as error:
                raise EOFError(str(error)) from None
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._out))
        buffer[:count] = self._out[:count]
        self._out = self._out[count:]
        return count


def _lines(path: pathlib.Path, stream) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(stream, 1):
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not valid UTF-8 (byte {error.start + 1} of the line).") from None


def _pieces(path: pathlib.Path, stream, longest: int) -> Iterator[str]:
    """Yields lines; one of more than `longest` bytes comes in pieces, cut between characters."""
    decoder, number, before, data = codecs.getincrementaldecoder("utf-8")(), 1, 0, b"\n"
    while data:
        data = stream.readline(longest)
        held, ended = len(decoder.getstate()[0]), not data or data.endswith(b"\n")
        try:
            piece = decoder.decode(data, final=ended)
        except UnicodeDecodeError as error:
            byte = before - held + error.start + 1
            raise UserError(f"{path}:{number}: not valid UTF-8 (byte {byte} of the line).") from None
        if piece:
            yield piece
        number, before = (number + 1, 0) if ended else (number, before + len(data))


def _read_txt(path: pathlib.Path, stream, text_key: str) -> Iterator[Document]:
    part, size, lines = 0, 0, []
    for line in _pieces(path, stream, LARGEST_DOCUMENT):
        lines.append(line)
        size += len(line)
        if size >= LARGEST_DOCUMENT:
            yield f"{path.name}#{part}", "".join(lines)
            part, size, lines = part + 1, 0, []
    if lines:
        yield f"{path.name}#{part}", "".join(lines)


def _read_jsonl(path: pathlib.Path, stream, text_key: str) -> Iterator[Document]:
    for number, line in _lines(path, stream):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not JSON ({error}).") from None
        text = row.get(text_key) if isinstance(row, dict) else None
        if not isinstance(text, str):
            has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{path}:{number}: no text under {text_key!r} (it has {has}); set data.text_key.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{path}:{number}: the text holds half a surrogate pair, which no UTF-8 has.") from None
        yield str(row.get("id", f"{path.name}:{number}")), text


def _read_csv(path: pathlib.Path, stream, text_key: str) -> Iterator[Document]:
    comma = ".csv" in (s.lower() for s in path.suffixes)
    lines = (line for _, line in _lines(path, stream))
    csv.field_size_limit(1 << 30)
    # A .tsv has no quoting: a quotation mark in it is text.
    dialect = {"delimiter": ","} if comma else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    rows = csv.reader(lines, strict=True, **dialect)
    column = int(text_key) if text_key.isdecimal() else None
    try:
        for row in rows:
            if not row:
                continue
            if column is None:
                if text_key not in row:
                    raise UserError(
                        f"{path}:1: no column {text_key!r} among {', '.join(row)[:200]}; set data.text_key "
                        "to a column's name, or to its number from 0 if there is no header."
                    )
                column = row.index(text_key)
                continue
            if column >= len(row):
                raise UserError(f"{path}:{rows.line_num}: {len(row)} columns, but the text is column {column}.")
            yield f"{path.name}:{rows.line_num}", row[column]
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: {error}.") from None


def _read_parquet(path: pathlib.Path, text_key: str, progress: Progress) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path}: no column {text_key!r} (it has {names}); set data.text_key.")
            number, size, groups = 0, path.stat().st_size, max(1, file.num_row_groups)
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(256, row_groups=[group], columns=[text_key]):
                    for text in batch.column(0).to_pylist():
                        number += 1
                        if not isinstance(text, str):
                            raise UserError(f"{path}:{number}: no text in column {text_key!r}.")
                        yield f"{path.name}:{number}", text
                progress.done += size // groups
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: damaged parquet file ({' '.join(str(error).split())}).") from None
