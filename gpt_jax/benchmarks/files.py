"""Reading the files of benchmarks: .jsonl, plain or compressed, and archives of them."""

from __future__ import annotations

import io
import json
import lzma
import pathlib
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from gpt_jax.data.readers import local_path
from gpt_jax.errors import UserError
from gpt_jax.tasks.examples import Malformed
from gpt_jax.tasks.readers import read_table

DATA = "$GPT_JAX_DATA/zeroshot"


def read_rows(path: str, **fields: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """Returns the objects of a .jsonl file (plain, .gz, .xz or .zst); ~ and $VARS of the path are expanded.

    Args:
      fields: name and type of what each object must have.

    Raises:
      UserError: no such file, or a malformed line (file and line named).
    """
    out = []
    for row in read_table(local_path(path)):
        if isinstance(row, Malformed):
            raise UserError(f"{row.where}: {row.why}.")
        _check(row.columns, fields, row.where)
        out.append({**row.columns, "where": row.where})
    return out


def read_archive(path: str, **fields: type | tuple[type, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (name of the member without folder and ending, object) of the .jsonl files of a tar archive, sorted.

    Raises:
      UserError: an archive that is missing, damaged or truncated, or a malformed line (file, member and line named).
    """
    found = local_path(path)
    try:
        with tarfile.open(found) as archive:
            members = sorted((m for m in archive.getmembers() if m.name.endswith(".jsonl")), key=lambda m: m.name)
            if not members:
                raise UserError(f"{found} holds no .jsonl file.")
            for member in members:
                name = pathlib.PurePosixPath(member.name).stem
                lines = io.TextIOWrapper(archive.extractfile(member), encoding="utf-8")
                for number, line in enumerate(lines, 1):
                    where = f"{found}:{member.name}:{number}"
                    try:
                        value = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise UserError(f"{where}: not JSON ({error}).") from None
                    _check(value, fields, where)
                    yield name, value
    except UnicodeDecodeError as error:
        raise UserError(f"{found}:{member.name}: not valid UTF-8 ({error.reason}).") from None
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error) as error:
        why = str(error).partition("\n")[0].rstrip(":.")  # tarfile's message goes on, a line for each compression
        raise UserError(f"{found} cannot be read: {why}.") from None


def _check(value: Any, fields: dict[str, Any], where: str) -> None:
    for name, kind in fields.items():
        if not isinstance(value, dict) or not isinstance(value.get(name), kind) or isinstance(value.get(name), bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            names = " or ".join({"str": "text", "list": "list", "int": "number"}[k.__name__] for k in kinds)
            raise UserError(f"{where}: no {names} under {name!r}.")
