"""Reads the tokens of whole images as they are stored, each row to its own place in memory: one copy.

What the page cache holds is copied from a map of it, which costs two thirds of a read. What it does not hold is read: a
disk that fails then ends in an error, where a map would end the process.
Legend: N rows of memory, M some of them, I images, T tokens an image, D width, P pieces of memory that one image fills.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, UInt8, UInt64
from torch import Tensor

from fluxsae.shards.encoding import Layout, decode_fp8
from fluxsae.shards.read import ShardSet, Stored

_libc = ctypes.CDLL(None, use_errno=True)
_libc.preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
_libc.preadv.restype = ctypes.c_ssize_t
if _TELLS := hasattr(_libc, "mincore"):
    _libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_PAGE = os.sysconf("SC_PAGESIZE")
_MOST = os.sysconf("SC_IOV_MAX")
"""Pieces of memory that one call can fill."""

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class Rows(NamedTuple):
    """Tokens as they are stored: bf16 or float32, or fp8 with a scale a token."""

    tokens: Float[Tensor, "N D"]
    scale: Float[Tensor, "N"] | None

    def part(self, begin: int, end: int) -> Rows:
        return Rows(self.tokens[begin:end], None if self.scale is None else self.scale[begin:end])

    def taken(self, index: Int64[Tensor, "M"]) -> Rows:
        """Some rows, as new ones."""
        tokens = _words(self.tokens).index_select(0, index).view(self.tokens.dtype)
        return Rows(tokens, None if self.scale is None else self.scale.index_select(0, index))

    def followed_by(self, other: Rows) -> Rows:
        """These rows and then others that are stored alike, as new ones."""
        tokens = torch.cat([_words(self.tokens), _words(other.tokens)]).view(self.tokens.dtype)
        if self.scale is None or other.scale is None:
            return Rows(tokens, None)
        return Rows(tokens, torch.cat([self.scale, other.scale]))

    def copy_(self, source: Rows) -> None:
        """As `Tensor.copy_`, without waiting for it where a device does it."""
        self.tokens.copy_(source.tokens, non_blocking=True)
        if self.scale is not None and source.scale is not None:
            self.scale.copy_(source.scale, non_blocking=True)

    def decoded(self) -> Float[Tensor, "N D"]:
        """The tokens themselves; for fp8 new ones, in bf16."""
        return self.tokens if self.scale is None else decode_fp8(self.tokens, self.scale)


def _words(tokens: Float[Tensor, "N D"]) -> Int[Tensor, "N W"]:
    """The same memory as whole numbers, as wide as rows allow: they move faster, and not all can be done to float8."""
    n_bytes = tokens.shape[1] * tokens.itemsize
    return tokens.view(next(word for word in _WORDS if n_bytes % word.itemsize == 0))


class Format(NamedTuple):
    """How all tokens of a set are stored."""

    dtype: torch.dtype
    width: int
    scaled: bool

    @property
    def row_bytes(self) -> int:
        """Bytes of a token on disk."""
        return self.width * self.dtype.itemsize + (4 if self.scaled else 0)

    def rows(self, n: int, memory: Tensor) -> Rows:
        """`n` rows in `memory`, whose uint8 may lie on any device."""
        size = n * self.width * self.dtype.itemsize
        tokens = memory[:size].view(self.dtype).view(n, self.width)
        return Rows(tokens, memory[-(-size // 4) * 4 :][: 4 * n].view(torch.float32) if self.scaled else None)

    def n_bytes(self, n: int) -> int:
        """The memory that `rows` needs."""
        return -(-n * self.width * self.dtype.itemsize // 4) * 4 + (4 * n if self.scaled else 0)


class RowReader:
    """Reads images of a set of tokens. Any number of threads may read at once."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self.n_tokens = shards.spec.n_tokens
        self.format = _format(shards.stored_tokens(0).layout)
        self._lock = threading.Lock()

    def read(self, images: Sequence[int], rows: Rows, places: Int64[np.ndarray, "I T"]) -> None:
        """Token t of image i goes to `rows[places[i, t]]`; ValueError as from `ShardSet.tokens` for a damaged one."""
        # All found before the first is read, since what is read drives the interpreter out of the processor's cache.
        found = [self._find(image) for image in images]
        target, size = rows.tokens.view(torch.uint8).numpy(), places.shape[1] * rows.tokens[0].nbytes
        absent = []
        for i, stored in enumerate(found):
            cached = _cached(stored, stored.layout.tokens, size)
            if cached is None:
                absent.append(i)
            else:
                target[places[i]] = cached.reshape(places.shape[1], -1)
        if absent:
            pieces = _pieces(rows.tokens, places[absent])
            self._fill([images[i] for i in absent], [found[i] for i in absent], pieces)
        if rows.scale is not None:
            scale = torch.empty(places.shape)
            self._fill_scale(images, found, scale)
            rows.scale.numpy()[places] = scale.numpy()

    def read_in_order(self, images: Sequence[int], rows: Rows) -> None:
        """The tokens of several images, one after the other; ValueError as from `read`."""
        found = [self._find(image) for image in images]
        self._fill(images, found, _whole(rows.tokens.view(len(images), -1)))
        if rows.scale is not None:
            self._fill_scale(images, found, rows.scale.view(len(images), -1))

    def _fill(self, images: Sequence[int], found: Sequence[Stored], pieces: UInt64[np.ndarray, "I P 2"]) -> None:
        self._check(images, _scatter(found, [stored.layout.tokens for stored in found], pieces))

    def _fill_scale(self, images: Sequence[int], found: Sequence[Stored], scale: Float[Tensor, "I T"]) -> None:
        offsets = [stored.layout.scale for stored in found if stored.layout.scale is not None]
        self._check(images, _scatter(found, offsets, _whole(scale)))

    def _check(self, images: Sequence[int], arrived: int) -> None:
        if arrived < len(images):
            raise self.shards.damaged(images[arrived], "it is cut short")

    def _find(self, image: int) -> Stored:
        with self._lock:  # the set's maps and indices are not made for several threads
            stored = self.shards.stored_tokens(image)
        if _format(stored.layout) != self.format:
            raise self.shards.damaged(image, f"its tokens are {stored.layout.dtype}, expected {self.format.dtype}")
        return stored


def _format(layout: Layout) -> Format:
    return Format(layout.dtype, layout.shape[1], layout.scale is not None)


def _cached(stored: Stored, offset: int, size: int) -> UInt8[np.ndarray, "B"] | None:
    """The bytes of a member from its offset on, mapped; None where not all of them are in memory, or in the file."""
    begin = stored.start + offset
    if not _TELLS or os.fstat(stored.tar.file.fd).st_size < begin + size:
        return None
    mapped = np.frombuffer(stored.tar.map, np.uint8, size, begin)
    first = mapped.ctypes.data // _PAGE * _PAGE
    n_bytes = mapped.ctypes.data + size - first
    pages = np.empty(-(-n_bytes // _PAGE), np.uint8)
    if _libc.mincore(first, n_bytes, pages.ctypes.data) != 0 or not (pages & 1).all():
        return None
    return mapped


def _pieces(rows: Tensor, places: Int64[np.ndarray, "I P"]) -> UInt64[np.ndarray, "I P 2"]:
    """Where the rows at `places` are in memory, as struct iovec: an address and a length."""
    size = rows.shape[1] * rows.itemsize
    pieces = np.empty((*places.shape, 2), np.uint64)
    pieces[..., 0] = rows.data_ptr() + places * size
    pieces[..., 1] = size
    return pieces


def _whole(rows: Tensor) -> UInt64[np.ndarray, "I 1 2"]:
    """A row an image, in one piece."""
    return _pieces(rows, np.arange(len(rows))[:, None])


def _scatter(found: Sequence[Stored], offsets: Sequence[int], pieces: UInt64[np.ndarray, "I P 2"]) -> int:
    """Fill pieces of one length with the bytes from each image's offset on; for how many images there were enough."""
    address, size, n_pieces = pieces.ctypes.data, int(pieces[0, 0, 1]), pieces.shape[1]
    for i, (stored, offset) in enumerate(zip(found, offsets, strict=True)):
        begin, done = stored.start + offset, 0
        while done < n_pieces * size:
            first = done // size
            n = min(_MOST, n_pieces - first)
            n_read = _libc.preadv(stored.tar.file.fd, address + 16 * (i * n_pieces + first), n, begin + done)
            if n_read < 0 and ctypes.get_errno() != errno.EINTR:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(stored.tar.file.path))
            if n_read == 0:
                return i
            done += max(0, n_read)
            if done % size:  # some file systems give less than they are asked for: go on within a piece
                piece, left = pieces[i, done // size], size - done % size
                piece[:] = piece.sum() - left, left
    return len(found)
