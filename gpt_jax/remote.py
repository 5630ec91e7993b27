"""Object stores: files at gs:// and s3:// URLs (file:// and memory:// too), through TensorStore's key-value drivers.

What needs a real file (memory maps, tokenizers, compressed text) gets a copy in the cache, once per host, and says so.
Checkpoints are Orbax's, which writes to folders and to gs://, whose folders `run_folder` opens.
Credentials are the driver's own business: Google's application default credentials, AWS's environment and files.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.files import atomic_write

_CHUNK = 64 << 20
_PATIENCE = {f"{store}_request_retries": {"max_retries": 8} for store in ("gcs", "s3")}  # two minutes or so
_URL = re.compile(r"(gs|s3|file|memory)://")


def is_url(path: str | os.PathLike) -> bool:
    """Tells whether a path is an object store's URL."""
    return _URL.match(str(path)) is not None


def has_scheme(path: str | os.PathLike) -> bool:
    """Tells whether a path is written as a URL, of a store that is known here or not."""
    return re.match(r"\w+://", str(path)) is not None


def refuse_url(path: str | os.PathLike, what: str, instead: str) -> None:
    """Raises UserError if `path` is a URL: `what` needs a local folder; `instead` is the way round."""
    if has_scheme(path):
        raise UserError(f"{what} is {str(path)!r}, but it needs a folder of a file system: {instead}.")


def run_folder(path: str | os.PathLike, what: str) -> pathlib.Path:
    """Returns the path of a run's folder: absolute on a file system; at gs:// an `epath.Path`, used in the same way.

    Raises:
      UserError: another store's URL, or gs:// without gcsfs; `what` is named.
    """
    if not has_scheme(path):
        return pathlib.Path(path).absolute()
    if not at_store(path):
        raise UserError(f"{what} is {str(path)!r}; it may be a folder (a mounted bucket too) or a gs:// URL.")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{what} is {str(path)!r}, which needs gcsfs: pip install -e '.[gcs]'.")
    import fsspec
    from etils import epath

    for name in ("gs", "gcs"):  # before epath makes its file system: what TensorStore and other hosts wrote must show
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    return epath.Path(str(path))


def at_store(path: str | os.PathLike) -> bool:
    """Tells whether a path is one at gs://."""
    return str(path).startswith("gs://")


@contextlib.contextmanager
def reaching(path: pathlib.Path) -> Iterator[None]:
    """Tells in one line what a store at gs:// refuses; the loss of another process stays what it is."""
    from gpt_jax.distributed import is_lost, several

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not at_store(path) or (several() and is_lost(error)):
            raise
        raise UserError(f"cannot use {str(path)!r}: {type(error).__name__}: {_first_line(error)}.") from error


class Remote:
    """The objects below a URL.

    Args:
      url: of the 'folder'. context: a tensorstore.Context; one and the same shares memory://.

    Raises:
      UserError: the URL or the store cannot be used.
    """

    def __init__(self, url: str, context: Any = None) -> None:
        import tensorstore

        self.url = url.rstrip("/") + "/"
        context = context or tensorstore.Context(_PATIENCE)
        try:
            self._store = tensorstore.KvStore.open(self.url, context=context).result()
        except Exception as error:
            raise UserError(f"cannot use {url!r}: {_first_line(error)}.") from None

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> bytes | None:
        """Returns an object's bytes, or those of a range of it; None if there is no such object."""
        piece = {} if start is None else {"byte_range": slice(start, stop)}
        result = self._do(key, self._store.read, key, **piece)
        return bytes(result.value) if result.state == "value" else None

    def read_end(self, key: str, size: int) -> bytes | None:
        """Returns the last `size` bytes of an object, all of a smaller one; None if there is no such object."""
        try:
            return self.read(key, -size)
        except UserError as error:
            if "OUT_OF_RANGE" not in str(error):
                raise
        return self.read(key)

    def write(self, key: str, data: bytes) -> None:
        self._do(key, self._store.write, key, data)

    def delete(self, key: str) -> None:
        self._do(key, self._store.write, key, None)

    def list(self) -> list[str]:
        """Returns the names of all objects, sorted."""
        return sorted(key.decode() for key in self._do("", self._store.list))

    def _do(self, key: str, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        try:
            return call(*arguments, **keywords).result()
        except Exception as error:
            raise UserError(f"cannot reach {self.url + key!r}: {_first_line(error)}.") from None

    def download(self, key: str, path: pathlib.Path, size: int | None = None) -> None:
        """Copies an object to a file, in pieces where its size is known; raises UserError if it is not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            for start in range(0, size, _CHUNK) if size else (None,):
                data = self.read(key, start, None if start is None else min(start + _CHUNK, size))
                if data is None:
                    raise UserError(f"{self.url + key!r}: no such object.")
                file.write(data)


def fetch_file(
    url: str, root: pathlib.Path, log: Callable[[str], None] | None = None, context: Any = None
) -> pathlib.Path:
    """Returns a local copy of an object, kept in `root` by URL: a changed object needs another name.

    Raises:
      UserError: no such object.
    """
    from gpt_jax.data.cache import build_folder

    folder, name = url.rsplit("/", 1)
    place = root / "remote" / hashlib.sha256(url.encode()).hexdigest()[:16]
    if not place.is_dir() and log:
        log(f"copying {url} to {place}")
    build_folder(place, lambda new: Remote(folder, context).download(name, new / name), f"a copy of {url}")
    return place / name


def fetch_folder(url: str, root: pathlib.Path) -> pathlib.Path:
    """Returns a local copy of what lies below a URL, as it is there now."""
    from gpt_jax.data.cache import locked

    base, _, name = url.rstrip("/").rpartition("/")
    folder = root / "remote" / hashlib.sha256(base.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / name):
        download(base, (name,), folder)
    return folder / name


def upload(
    folder: pathlib.Path, names: Sequence[str], remote: Remote, known: dict[str, tuple[int, int]] | None = None
) -> list[str]:
    """Copies the files and folders of these names, where they are there, below a URL; returns what was copied.

    Args:
      known: {file: (time of its last change, size)} of what is there already; it is left out, and the new ones added.
    """
    done = []
    for name in names:
        path = folder / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                key, stat = file.relative_to(folder).as_posix(), file.stat()
                look = (stat.st_mtime_ns, stat.st_size)
                if known is None or known.get(key) != look:
                    remote.write(key, file.read_bytes())
                    done.append(key)
                if known is not None:
                    known[key] = look
    return done


def download(url: str, names: Sequence[str], folder: pathlib.Path) -> list[str]:
    """Makes `folder` hold what a URL does of these names, files or folders, and no other of them; returns the files."""
    remote, there = Remote(url), {}
    for name in names:
        data = remote.read(name)
        if data is not None:
            there[name] = data
            continue
        inside = Remote(f"{remote.url}{name}")
        there |= {f"{name}/{key}": inside.read(key) for key in inside.list() if key and not key.endswith("/")}
    for name in names:
        path = folder / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.relative_to(folder).as_posix() not in there:
                file.unlink(missing_ok=True)
        if path.is_dir() and not any(key.startswith(f"{name}/") for key in there):
            shutil.rmtree(path)
    for key, data in there.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / key, data or b"")
    return sorted(there)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
