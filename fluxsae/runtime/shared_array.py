"""A float32 array in a file that one or more processes fill row by row. Legend: P rows, M some of them."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Float, Int
from lightning.pytorch import Trainer

from fluxsae.files import remove_parts, whole_file
from fluxsae.runtime.gathering import gather_objects

_AT_ONCE = 1 << 25
"""Bytes that are filled before the disk is asked to take them, while others are computed."""


class SharedArray:
    """An `.npy` file that several processes write. It appears under its name when all rows have been written.

    It is a memory map, so it takes no host memory of its own.

    Args:
        trainer: the Trainer whose processes write to it. All of them must see the file's folder.
        path: the file.
        shape: of the array.
    """

    def __init__(self, trainer: Trainer, path: Path, shape: tuple[int, ...]) -> None:
        self.path = path
        self._n_written = self._n_bytes = 0
        self._temporary = ExitStack()
        name = ""
        if trainer.is_global_zero:
            remove_parts(path)
            name = str(self._temporary.enter_context(whole_file(path)))
            _make(Path(name), shape)
        self._part = Path(trainer.strategy.broadcast(name))
        self.array: Float[np.ndarray, "P *shape"] = np.load(self._part, mmap_mode="r+")

    def write(self, rows: Int[np.ndarray, "M"], values: Float[np.ndarray, "M *shape"]) -> None:
        """Fill some rows, each of which must be written once."""
        self.array[rows] = values
        self._n_written += len(rows)
        self._n_bytes += values.nbytes
        if self._n_bytes >= _AT_ONCE:
            self._n_bytes = 0
            self._start_writing()

    def _start_writing(self) -> None:
        """Have the disk begin with what has been filled. Nobody waits for it."""
        if hasattr(os, "posix_fadvise"):
            with self._part.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def n_written(self, trainer: Trainer) -> int:
        """How many rows all processes have written; what they wrote is in the file from then on."""
        if isinstance(self.array, np.memmap):
            self.array.flush()
        return sum(gather_objects(trainer, [self._n_written]))

    def finish(self) -> None:
        """Give the file its name, when every process has asked for `n_written`. Only the first process has a part."""
        self._temporary.close()

    def discard(self, exception: BaseException, traceback: TracebackType | None = None) -> None:
        """Remove what has been written."""
        self._temporary.__exit__(type(exception), exception, traceback)


def _make(path: Path, shape: tuple[int, ...]) -> None:
    if 0 in shape:  # which no memory map can be of
        np.save(path, np.zeros(shape, np.float32))
        return
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    reserve(path, array.nbytes + array.offset)
    array.flush()


def reserve(path: Path, size: int) -> None:
    """Have the disk keep `size` bytes for a file. Writing to a map of one that it has no room for kills the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, size)
