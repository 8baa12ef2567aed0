"""One run at a time in a folder: a second one is refused, and told which is the first."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import socket
import sys
import warnings
from datetime import datetime
from pathlib import Path
from typing import ClassVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".in-use"


class FolderInUseError(ValueError):
    """Another run is writing to the folder."""


class _LockFile:
    """The lock file of a folder, which is made when absent, and how often this process holds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.n_holders = 0
        self._made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._handle = self._acquire(folder / LOCK)

    def check(self) -> None:
        if self._handle is not None and not _is_at(self._handle, self.folder / LOCK):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self.folder))

    def release(self) -> None:
        if self._handle is not None:
            if _is_at(self._handle, self.folder / LOCK):
                (self.folder / LOCK).unlink(missing_ok=True)  # while it is ours
            os.close(self._handle)
        if self._made:
            with contextlib.suppress(OSError):  # only if nothing was put in
                self.folder.rmdir()

    def _acquire(self, path: Path) -> int | None:
        """A file descriptor that holds the lock; None where there are no locks."""
        while fcntl is not None:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(handle, 4096, 0).decode(errors="replace").strip() or "another run"
                os.close(handle)
                raise FolderInUseError(
                    f"{self.folder} is in use by {holder}; wait until that ends, stop it, or name another folder."
                ) from error
            except OSError as error:
                os.close(handle)
                warnings.warn(f"{self.folder} cannot be locked ({error}); start no second run in it.", stacklevel=4)
                return None
            if _is_at(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{_this_run()}\n".encode(errors="replace"), 0)
                return handle
            os.close(handle)  # its last holder removed it between our opening and our locking it
        return None


class FolderLock:
    """A folder that this process alone writes to, until `release` or its end, however it ends.

    A lock of the operating system on the file `.in-use`, which says whose it is. A process may lock a folder several
    times. Where there are no such locks (on Windows, on some network drives) nothing is refused.

    Raises:
        FolderInUseError: naming the process that has it.
    """

    _held: ClassVar[dict[Path, _LockFile]] = {}

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        lock = self._held.get(self.folder) or _LockFile(self.folder)
        lock.n_holders += 1
        self._held[self.folder] = lock
        self._released = False

    def release(self) -> None:
        """Let the folder go; nothing when that is done."""
        if self._released:
            return
        self._released = True
        lock = self._held[self.folder]
        lock.n_holders -= 1
        if lock.n_holders == 0:
            del self._held[self.folder]
            lock.release()


def check_locks() -> None:
    """OSError (ESTALE) when a folder that this process has locked is not at its path any more: its drive went."""
    for lock in list(FolderLock._held.values()):
        lock.check()


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _this_run() -> str:
    started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return f"process {os.getpid()} on {socket.gethostname()} since {started} ({command[:500]})"
