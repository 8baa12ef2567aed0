"""Mixes training tokens in host memory.

Every image is read once, from its shard's pages straight to where the order wants its tokens, so a batch is a stretch
of that memory and is not copied again.
Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from fluxsae.data.mixing.memory import Recycled, threads
from fluxsae.data.mixing.order import Chunk
from fluxsae.shards import RowReader, TokenBlock

_TASK = 2**24
"""Bytes that a thread reads at a time, about: enough for what the interpreter does about them not to matter."""


class HostFilling(NamedTuple):
    """Rows in their order, once the reads are done."""

    rows: TokenBlock
    reads: list[Future[None]]
    ends_epoch: bool

    def wait(self) -> TokenBlock:
        for read in self.reads:
            read.result()
        return self.rows


class HostMixing:
    """Two pieces of memory, one handed out while the other is filled, of `n_images` images each.

    Together they hold 2 · n_images · T tokens as they are stored: 4.0 GB for 1,280 images of 256 tokens and 3,072
    channels in bf16, half of that in fp8. A piece is filled anew when nobody has a batch of it any more; to whoever
    keeps batches, new memory is given.
    """

    def __init__(self, reader: RowReader, n_images: int, batch_size: int, n_readers: int) -> None:
        self.reader = reader
        self.batch_size = batch_size
        self.n_readers = n_readers
        self.images_per_task = max(1, _TASK // reader.format.n_bytes(reader.n_tokens))
        self._pieces = Recycled(reader.format.n_bytes(n_images * reader.n_tokens + batch_size), 2)

    def batches(self, chunks: Iterator[Chunk]) -> Generator[TokenBlock | None]:
        """The tokens of all chunks in batches [B, D], and None behind an epoch's last, which may be smaller.

        ValueError for a damaged shard.
        """
        with threads(self.n_readers) as readers:
            yield from self._batches(chunks, readers)

    def _batches(self, chunks: Iterator[Chunk], readers: ThreadPoolExecutor) -> Iterator[TokenBlock | None]:
        chunk, rest = next(chunks, None), None
        ahead = None if chunk is None else self._fill(chunk, rest, readers)
        while ahead is not None:
            chunk = next(chunks, None)  # drawn while the last one is being read
            rows, ends_epoch, ahead = ahead.wait(), ahead.ends_epoch, None
            n_batched = len(rows.tokens) // self.batch_size * self.batch_size
            rest = None if ends_epoch else rows.part(n_batched, len(rows.tokens))
            n = len(rows.tokens) if ends_epoch else n_batched
            for begin in range(0, n, self.batch_size):
                # The other piece is free when the last batch of it is dropped, which is after the first of this one.
                if ahead is None and chunk is not None and self._pieces.has_room():
                    ahead = self._fill(chunk, rest, readers)
                yield rows.part(begin, min(begin + self.batch_size, n))
            if ahead is None and chunk is not None:
                ahead = self._fill(chunk, rest, readers)
            if ends_epoch:
                yield None

    def _fill(self, chunk: Chunk, rest: TokenBlock | None, readers: ThreadPoolExecutor) -> HostFilling:
        """Begin to read a chunk; what did not fill a batch of the last one goes before it."""
        n, n_rest = len(chunk.order), 0 if rest is None else len(rest.tokens)
        rows = self.reader.format.rows(n_rest + n, self._pieces.take())
        places = np.empty(n, np.int64)
        # What is skipped goes to the end, where it is not handed out.
        order = chunk.order.roll(-chunk.n_skipped) if chunk.n_skipped else chunk.order
        places[order.numpy()] = np.arange(n_rest, n_rest + n)
        place_of = places.reshape(len(chunk.images), -1)
        reads = [readers.submit(rows.part(0, n_rest).copy_, rest)] if rest is not None else []
        for i in range(0, len(chunk.images), self.images_per_task):
            some = slice(i, i + self.images_per_task)
            reads.append(readers.submit(self.reader.read, chunk.images[some], rows, place_of[some]))
        return HostFilling(rows.part(0, n_rest + n - chunk.n_skipped), reads, chunk.ends_epoch)
