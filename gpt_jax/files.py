"""Files that a crash cannot tear: written beside their place, flushed to the disk, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from gpt_jax.errors import UserError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_SPACE_TEXT = ("No space left on device", "Disk quota exceeded", "File too large", "ENOSPC")


def is_no_space(error: BaseException) -> bool:
    """Tells whether an error, or one that it came from, says that the disk (or a quota) is full."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return True
        if any(text in str(error) for text in _NO_SPACE_TEXT):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def explain_no_space(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Turns a full disk met inside the block into a UserError that names the file and the space that is left."""
    try:
        yield
    except OSError as error:
        if not is_no_space(error):
            raise
        raise UserError(no_space_message(path, what)) from error


def no_space_message(path: str | os.PathLike, what: str) -> str:
    """Returns the sentence that tells the user that `what` could not be written to `path`."""
    folder = pathlib.Path(path).absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**20
    return (
        f"no space left on the device for {what} at {path} ({free:,.0f} MiB free): "
        "free some and run the same command again, nothing written before is lost."
    )


def fsync_folder(folder: str | os.PathLike) -> None:
    """Makes the names in a folder durable (a rename is not until its folder is flushed)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: str | os.PathLike, data: bytes | str) -> None:
    """Replaces the file at `path` by `data` (text as UTF-8): a reader or a crash sees the old or the new one, whole.

    Raises:
      UserError: no space left on the device; the old file is untouched.
    """
    path = pathlib.Path(path)
    data = data.encode() if isinstance(data, str) else data
    with explain_no_space(path, path.name), replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator:
    """Opens a binary file that takes the place of `path` when the block ends without an error."""
    path = pathlib.Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def remove_folder(folder: str | os.PathLike) -> None:
    """Deletes a folder so that a crash halfway leaves none that looks whole: renamed first, then emptied."""
    folder = pathlib.Path(folder)
    doomed = folder.with_name(f".{folder.name}.deleting")
    if doomed.exists():
        shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    fsync_folder(folder.parent)
    shutil.rmtree(doomed)


def clean_leftovers(folder: str | os.PathLike) -> None:
    """Removes what a killed process left of `atomic_write` and `remove_folder` in a folder (by its exclusive user)."""
    for path in pathlib.Path(folder).glob(".*"):
        if path.name.endswith(".deleting"):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.endswith(".tmp"):
            path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
