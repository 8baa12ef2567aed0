"""Files that appear under their names only when they are whole."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from glob import escape
from pathlib import Path

from fluxsae.files.folder_lock import check_locks

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
        check_locks()
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
    check_locks()
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


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
