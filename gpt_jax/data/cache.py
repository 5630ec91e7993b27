"""The cache of tokenizers and token stores: folders by content hash, built under a lock, put in place by a rename."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.files import atomic_write, explain_no_space
from gpt_jax.remote import refuse_url


def cache_place(cache_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Returns the cache's folder, made or not: `cache_dir`, else $GPT_JAX_CACHE, else ~/.cache/gpt_jax."""
    place = cache_dir or os.environ.get("GPT_JAX_CACHE") or "~/.cache/gpt_jax"
    refuse_url(place, "GPT_JAX_CACHE", "each host has a cache of its own")
    return pathlib.Path(place).expanduser()


def cache_root(cache_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Returns the cache's folder (see `cache_place`), made if needed."""
    root = cache_place(cache_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the cache folder {str(root)!r} ({error.strerror}); set $GPT_JAX_CACHE.") from None
    return root


def content_hash(value: Any) -> str:
    """Returns 16 hex digits of the SHA-256 of a JSON-able value (keys sorted)."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: str | os.PathLike, log: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds an exclusive lock on `path`.lock; the kernel drops it with the process, even one killed by -9."""
    with open(f"{path}.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if log:
                log(f"waiting for another process that builds {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_folder(
    path: pathlib.Path,
    build: Callable[[pathlib.Path], None],
    what: str = "a file",
    log: Callable[[str], None] | None = None,
) -> pathlib.Path:
    """Returns folder `path`, made by `build(temporary folder)` under a lock unless it is there already."""
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with explain_no_space(path, what), locked(path, log):
        if not path.is_dir():
            temporary = path.with_name(path.name + ".new")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            build(temporary)
            os.replace(temporary, path)
    return path


def remembered(memo: pathlib.Path | None, key: str, compute: Callable[[], Any]) -> Any:
    """Returns compute(), kept as JSON in folder `memo` under the hash of `key` (no folder: nothing is kept)."""
    if memo is None:
        return compute()
    path = memo / f"{content_hash(key)}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    value = compute()
    memo.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(value))
    return value
