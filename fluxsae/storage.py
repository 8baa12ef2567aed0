"""Files that appear under their names only when whole, and the small text formats that the stages hand over."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from fluxsae.claims import check_claims

ALMOST_NOTHING = 1 << 16
"""Bytes: a disk with less room than this is full."""


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it to `path`, on failure remove it.

    A reader sees the old file or the new one, never a part. The temporary name starts with a dot and keeps the suffix.
    An OSError names `path`, also where a library tells of a full disk in its own way.
    """
    path = Path(path)
    with naming(path):
        check_claims()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, 0o666))
        mode = stat.S_IMODE(temporary.stat().st_mode)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(mode)  # of any new file, whatever a library has made of it
            put_in_place(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a finished file its name, for good. What it holds must have reached the disk."""
    check_claims()
    temporary.replace(path)
    _sync_folder(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError from within names `path`, also where a library tells of a full disk in its own way."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:  # torch and safetensors raise their own
        if path.parent.is_dir() and shutil.disk_usage(path.parent).free < ALMOST_NOTHING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def remove_parts(path: str | Path) -> None:
    """Remove what processes that were killed while they wrote `path` left; for when none is writing it."""
    path = Path(path)
    for part in path.parent.glob(f".{escape(path.stem)}-{'[0-9a-f]' * 8}{escape(path.suffix)}"):
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, keys in their own order, ending in a newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The JSON value in `path`; FileNotFoundError when missing, ValueError naming the file when it does not parse."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it or make it again.") from error


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A record with a `hash` of all that it says, so that a reader sees when a digit has changed."""
    return {**values, "hash": hash_json(values)}


def unsealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `sealed` was given. ValueError when it says something else now; a record without a hash is an older one."""
    inner = {key: value for key, value in values.items() if key != "hash"}
    if "hash" in values and values["hash"] != hash_json(inner):
        raise ValueError("it is damaged: its content does not have the hash that it names")
    return inner


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write `rows` under a header of `columns`; floats with 9 significant digits, None as an empty field.

    Fields are text to whoever reads the file: one that a spreadsheet would run as a formula gets a leading apostrophe.
    """
    _write_fields(path, columns, ([_field(row.get(column)) for column in columns] for row in rows))


def write_columns(path: str | Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of one length as `write_csv` writes rows; long tables are written several times faster so."""
    _write_fields(path, list(columns), zip(*(map(_field, values) for values in columns.values()), strict=True))


def _write_fields(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def read_columns(path: str | Path) -> dict[str, list[str]]:
    """The columns of a CSV file with a header, every value as text.

    FileNotFoundError when it is missing, ValueError when a row is longer or shorter than the header.
    """
    header, rows = _read_fields(path)
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path} has a row of {len(row)} fields, expected {len(header)}: {row}; make it again.")
    return {name: [_unquote(row[i]) for row in rows] for i, name in enumerate(header)}


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header, every value as text. FileNotFoundError when it is missing."""
    header, rows = _read_fields(path)
    if any(len(row) != len(header) for row in rows):  # a damaged file
        with Path(path).open(newline="", encoding="utf-8") as file:
            return [{key: _unquote(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return [dict(zip(header, map(_unquote, row), strict=True)) for row in rows]


def _read_fields(path: str | Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows, as they are stored, but for blank lines."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        header, *rows = [row for row in csv.reader(file) if row] or [[]]
    return header, rows


def sha256_file(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """The SHA-256 of a JSON value, the same for any order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


_FORMULA = frozenset("=+-@\t\r'")


def _field(value: Any) -> str:
    if isinstance(value, str):
        return "'" + value if value[:1] in _FORMULA else value
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.9g}"
    return str(value)


def _unquote(value: str) -> str:
    return value[1:] if value and value[0] == "'" else value


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
