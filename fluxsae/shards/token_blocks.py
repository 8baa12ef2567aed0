"""Reads the tokens of whole images as they are stored, each row to its own place in memory: one copy.

What the page cache holds is copied from a map of it, which costs two thirds of a read. What it does not hold is read: a
disk that fails then ends in an error, where a map would end the process. Beside a busy interpreter it is calls that
count, as a thread waits for its turn after each: images in order are copied by one call.
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
from jaxtyping import Float, Int, Int64, UInt64
from torch import Tensor

from fluxsae.shards.encoding import TokenLayout, decode_fp8
from fluxsae.shards.read import ShardSet, Stored

_libc = ctypes.CDLL(None, use_errno=True)
_libc.preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
_libc.preadv.restype = ctypes.c_ssize_t
if _TELLS := hasattr(_libc, "mincore"):
    _libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
if _COPIES := _TELLS and hasattr(_libc, "process_vm_readv"):
    _pieces_of_memory = (ctypes.c_void_p, ctypes.c_ulong)
    _libc.process_vm_readv.argtypes = [ctypes.c_int, *_pieces_of_memory, *_pieces_of_memory, ctypes.c_ulong]
    _libc.process_vm_readv.restype = ctypes.c_ssize_t
    _short = ctypes.PyDLL(None)  # for calls too short to let other threads go on meanwhile
    _short.mincore.argtypes = _libc.mincore.argtypes
_PAGE = os.sysconf("SC_PAGESIZE")
_MOST = os.sysconf("SC_IOV_MAX")
"""Pieces of memory that one call can fill."""

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class TokenBlock(NamedTuple):
    """Tokens as they are stored: bf16 or float32, or fp8 with a scale a token."""

    tokens: Float[Tensor, "N D"]
    scale: Float[Tensor, "N"] | None

    def part(self, begin: int, end: int) -> TokenBlock:
        return TokenBlock(self.tokens[begin:end], None if self.scale is None else self.scale[begin:end])

    def taken(self, index: Int64[Tensor, "M"]) -> TokenBlock:
        """Some rows, as new ones."""
        tokens = _words(self.tokens).index_select(0, index).view(self.tokens.dtype)
        return TokenBlock(tokens, None if self.scale is None else self.scale.index_select(0, index))

    def followed_by(self, other: TokenBlock) -> TokenBlock:
        """These rows and then others that are stored alike, as new ones."""
        tokens = torch.cat([_words(self.tokens), _words(other.tokens)]).view(self.tokens.dtype)
        if self.scale is None or other.scale is None:
            return TokenBlock(tokens, None)
        return TokenBlock(tokens, torch.cat([self.scale, other.scale]))

    def copy_(self, source: TokenBlock) -> None:
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

    def rows(self, n: int, memory: Tensor) -> TokenBlock:
        """`n` rows in `memory`, whose uint8 may lie on any device."""
        size = n * self.width * self.dtype.itemsize
        tokens = memory[:size].view(self.dtype).view(n, self.width)
        return TokenBlock(tokens, memory[-(-size // 4) * 4 :][: 4 * n].view(torch.float32) if self.scaled else None)

    def n_bytes(self, n: int) -> int:
        """The memory that `rows` needs."""
        return -(-n * self.width * self.dtype.itemsize // 4) * 4 + (4 * n if self.scaled else 0)


class RowReader:
    """Reads images of a set of tokens. Any number of threads may read at once."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self.n_tokens = shards.spec.n_tokens
        self._layout = shards.stored_tokens(0).layout
        self.format = _format(self._layout)
        self._starts = np.full(len(shards), -1)  # of images that are laid out so, where that is known
        self._lock = threading.Lock()

    def read(self, images: Sequence[int], rows: TokenBlock, places: Int64[np.ndarray, "I T"]) -> None:
        """Token t of image i goes to `rows[places[i, t]]`; ValueError as from `ShardSet.tokens` for a damaged one."""
        # All found before the first is read, since what is read drives the interpreter out of the processor's cache.
        found = [self._find(image) for image in images]
        n_tokens, width = places.shape[1], rows.tokens[0].nbytes
        tokens, scales = rows.tokens.view(torch.uint8).numpy(), None if rows.scale is None else rows.scale.numpy()
        pages = _Pages()
        absent = []
        for i, stored in enumerate(found):
            layout, memory = stored.layout, stored.tar.map
            if not pages.are_in_memory(stored):
                absent.append(i)
                continue
            mapped = np.frombuffer(memory, np.uint8, n_tokens * width, stored.start + layout.tokens)
            tokens[places[i]] = mapped.reshape(n_tokens, width)
            if scales is not None and layout.scale is not None:
                scales[places[i]] = np.frombuffer(memory, np.float32, n_tokens, stored.start + layout.scale)
        if absent:
            rest, places = [images[i] for i in absent], places[absent]
            found = [found[i] for i in absent]
            self._fill(rest, found, _pieces(rows.tokens, places))
            if scales is not None:
                scale = torch.empty(places.shape)
                self._fill_scale(rest, found, scale)
                scales[places] = scale.numpy()

    def read_in_order(self, images: Sequence[int], rows: TokenBlock) -> None:
        """The tokens of several images, one after the other; ValueError as from `read`."""
        found = [self._find(image) for image in images]
        pieces = _whole(rows.tokens.view(len(images), -1))
        scale = None if rows.scale is None else rows.scale.view(len(images), -1)
        if _copied(found, pieces, None if scale is None else _whole(scale)):
            return
        self._fill(images, found, pieces)
        if scale is not None:
            self._fill_scale(images, found, scale)

    def located(self, images: Sequence[int]) -> Int64[np.ndarray, "I 3"]:
        """The shard of each image, and where in it its tokens and their scales begin; ValueError as from `read`.

        Of tokens without scales, the last number says nothing.
        """
        layout, starts = self._layout, self._starts[images]
        shards = self.shards.shards_of(images)
        scale = layout.scale or 0
        places = np.stack([shards, starts + layout.tokens, starts + scale], axis=-1)
        for i in np.flatnonzero(starts < 0).tolist():
            stored = self._find(images[i])
            places[i, 1:] = stored.start + stored.layout.tokens, stored.start + (stored.layout.scale or 0)
        return places

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
            start = int(self._starts[image])
            if start >= 0:
                return Stored(self.shards.tar_of(image), start, self._layout)
            stored = self.shards.stored_tokens(image)
        if _format(stored.layout) != self.format:
            raise self.shards.damaged(image, f"its tokens are {stored.layout.dtype}, expected {self.format.dtype}")
        if stored.layout == self._layout:
            self._starts[image] = stored.start
        return stored


def _format(layout: TokenLayout) -> Format:
    return Format(layout.dtype, layout.shape[1], layout.scale is not None)


class _Pages:
    """Asks which pages of a map are in memory, again and again."""

    def __init__(self) -> None:
        self._told = bytearray()
        self._address = 0

    def are_in_memory(self, stored: Stored) -> bool:
        """Whether all pages that hold an image's tokens and their scales are, and the file still has them."""
        layout, tar = stored.layout, stored.tar
        begin, end = stored.start + min(layout.tokens, layout.scale or layout.tokens), stored.start + _end(layout)
        if not _TELLS or os.fstat(tar.file.fd).st_size < end:
            return False
        first = (tar.address + begin) // _PAGE * _PAGE
        n_bytes = tar.address + end - first
        n_pages = -(-n_bytes // _PAGE)
        if n_pages > len(self._told):
            self._told = bytearray(n_pages)
            self._address = ctypes.addressof(ctypes.c_ubyte.from_buffer(self._told))
        return _libc.mincore(first, n_bytes, self._address) == 0 and self._told.count(1, 0, n_pages) == n_pages


def _copied(
    found: Sequence[Stored], tokens: UInt64[np.ndarray, "I 1 2"], scale: UInt64[np.ndarray, "I 1 2"] | None
) -> bool:
    """Copy what images hold to their pieces from the maps; False where not all seem to be in memory, or were copied.

    Images ascend. The kernel copies, for which what a map does not have after all is no fault but an end.
    """
    ends = {stored.tar.file.fd: stored.start + _end(stored.layout) for stored in found}  # of the last in each
    if not _COPIES or any(os.fstat(fd).st_size < end for fd, end in ends.items()):
        return False
    address = np.array([stored.tar.address + stored.start + stored.layout.tokens for stored in found], np.uint64)
    size = int(tokens[0, 0, 1])
    if not all(_is_in_memory(one + size // 2) for one in address.tolist()):
        return False
    sources, targets = [_sized(address, size)], [tokens[:, 0]]
    if scale is not None:
        apart = np.array([(stored.layout.scale or 0) - stored.layout.tokens for stored in found])
        sources.append(_sized(address + apart.astype(np.uint64), int(scale[0, 0, 1])))
        targets.append(scale[:, 0])
    source, target = np.concatenate(sources), np.concatenate(targets)
    for i in range(0, len(source), _MOST):
        n = min(_MOST, len(source) - i)
        read = _libc.process_vm_readv(os.getpid(), target.ctypes.data + 16 * i, n, source.ctypes.data + 16 * i, n, 0)
        if read != source[i : i + n, 1].sum():
            return False
    return True


def _sized(addresses: UInt64[np.ndarray, "*shape"], size: int) -> UInt64[np.ndarray, "*shape 2"]:
    """Pieces of memory of one size, as struct iovec: an address and a length."""
    return np.stack([addresses, np.full_like(addresses, size)], axis=-1)


def _end(layout: TokenLayout) -> int:
    """Where what is read of a member ends, from its start."""
    n_tokens, width = layout.shape
    end = layout.tokens + n_tokens * width * layout.dtype.itemsize
    return end if layout.scale is None else max(end, layout.scale + 4 * n_tokens)


def _is_in_memory(address: int) -> bool:
    """Whether the page at this address of a map is."""
    told = ctypes.c_ubyte(0)
    return _short.mincore(address // _PAGE * _PAGE, _PAGE, ctypes.byref(told)) == 0 and bool(told.value & 1)


def _pieces(rows: Tensor, places: Int64[np.ndarray, "I P"]) -> UInt64[np.ndarray, "I P 2"]:
    """Where the rows at `places` are in memory."""
    size = rows.shape[1] * rows.itemsize
    return _sized((rows.data_ptr() + places * size).astype(np.uint64), size)


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
