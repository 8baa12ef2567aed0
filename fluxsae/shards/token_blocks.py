"""Reads the tokens of whole images as they are stored, each row to its own place in memory.

They are read from the file, not copied from a map of it: a disk that fails then ends in an error, where a map would end
the process. An image goes through a small buffer, which stays in the processor's cache.
Legend: N rows of memory, M some of them, I images, T tokens an image, D width.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, Shaped
from torch import Tensor

from fluxsae.shards.encoding import TokenLayout, decode_fp8
from fluxsae.shards.read import ShardSet, Stored

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
        tokens, scales = _arrays(rows)
        some, some_scales = np.empty_like(tokens, shape=(self.n_tokens, tokens.shape[1])), None
        if scales is not None:
            some_scales = np.empty_like(scales, shape=self.n_tokens)
        for image, stored, place in zip(images, found, places, strict=True):
            self._fill(image, stored, some, some_scales)
            tokens[place] = some
            if scales is not None:
                scales[place] = some_scales

    def read_in_order(self, images: Sequence[int], rows: TokenBlock) -> None:
        """The tokens of several images, one after the other; ValueError as from `read`."""
        found = [self._find(image) for image in images]
        tokens, scales = _arrays(rows)
        for i, (image, stored) in enumerate(zip(images, found, strict=True)):
            its = slice(i * self.n_tokens, (i + 1) * self.n_tokens)
            self._fill(image, stored, tokens[its], None if scales is None else scales[its])

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

    def _fill(
        self, image: int, stored: Stored, tokens: Shaped[np.ndarray, "T B"], scales: Shaped[np.ndarray, "T"] | None
    ) -> None:
        whole = _read(stored, stored.layout.tokens, tokens)
        if scales is not None and stored.layout.scale is not None:
            whole = _read(stored, stored.layout.scale, scales) and whole
        if not whole:
            raise self.shards.damaged(image, "it is cut short")

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


def _arrays(rows: TokenBlock) -> tuple[Shaped[np.ndarray, "N B"], Shaped[np.ndarray, "N"] | None]:
    """The same memory: tokens as bytes, B a row, and their scales."""
    return rows.tokens.view(torch.uint8).numpy(), None if rows.scale is None else rows.scale.numpy()


def _read(stored: Stored, offset: int, target: Shaped[np.ndarray, "..."]) -> bool:
    """Fill an array with what a member holds from an offset on; whether the file had all of it."""
    memory, begin, done = target.data.cast("B"), stored.start + offset, 0
    while done < len(memory):
        n_read = os.preadv(stored.tar.file.fd, [memory[done:]], begin + done)  # some file systems give less
        if n_read == 0:
            return False
        done += n_read
    return True
