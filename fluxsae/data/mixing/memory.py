"""Memory that is used again, and threads that stop when they are not wanted any more."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import UInt8
from torch import Tensor


class Recycled:
    """Pieces of memory of one size, each used again once no tensor shares it.

    Fresh memory costs as much as what is read into it, since the system clears it page by page.
    """

    def __init__(self, n_bytes: int, keep: int) -> None:
        self.n_bytes = n_bytes
        self.keep = keep
        self._n_made = 0
        self._free: list[mmap.mmap] = []

    def has_room(self) -> bool:
        """Whether a piece is free, or can be made without there being more than `keep`."""
        return bool(self._free) or self._n_made < self.keep

    def take(self) -> UInt8[Tensor, "n_bytes"]:
        """A piece, a new one if need be; what it holds is arbitrary."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = self._make()
        view = memoryview(memory)
        weakref.finalize(view, self._give_back, memory).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8)

    def _make(self) -> mmap.mmap:
        self._n_made += 1
        memory = mmap.mmap(-1, self.n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared gets no huge pages
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def _give_back(self, memory: mmap.mmap) -> None:
        if len(self._free) < self.keep:
            self._free.append(memory)
        else:
            self._n_made -= 1


@contextlib.contextmanager
def threads(n: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads; at the end, what is not begun is dropped."""
    pool = ThreadPoolExecutor(n)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
