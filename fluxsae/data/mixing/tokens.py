"""The stream of training tokens.

Legend: B batch, D width.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from fluxsae.data.mixing.device import DeviceMixing, InFlightLimiter
from fluxsae.data.mixing.host import HostMixing
from fluxsae.data.mixing.order import WHOLE, Chunk, Part, draw_chunks, largest_chunk
from fluxsae.shards import RowReader, ShardSet, TokenBlock


class Feed:
    """What a training has been given so far: bytes as they are stored, and the seconds that it waited for them."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self.waited = 0.0


class _Coming(NamedTuple):
    """The batches from an epoch on, some of which may have been read already."""

    epoch: int
    batches: Generator[TokenBlock | None]


class MixedTokens(IterableDataset[TokenBlock]):
    """Batches [B, D] of training tokens as they are stored, each once an epoch, in an order that (seed, epoch) decides.

    The images are permuted; up to `buffer_images` at a time are loaded and their tokens mixed, while the next ones are
    read; what does not fill a batch waits for them. With several processes all end after the same number of batches,
    so a few tokens of the longer shares go unseen in an epoch.

    How many threads read, and whether tokens are mixed on a `device` or (None) in host memory, leaves the order as it
    is. In host memory a batch is a view: it must not be written to.

    While an epoch's last images are handed out, the first of the next one are read, up to `last_epoch` or (None)
    without end; `close` gives those up, with the threads and the memory on the device.
    """

    def __init__(
        self,
        shards: ShardSet,
        images: Sequence[int],
        *,
        batch_size: int,
        buffer_images: int = 1280,
        seed: int = 0,
        part: Part = WHOLE,
        readers: int = 2,
        device: torch.device | None = None,
        feed: Feed | None = None,
        last_epoch: int | None = 0,
    ) -> None:
        self.shards = shards
        self.images = list(images)
        self.batch_size = batch_size
        self.buffer_images = buffer_images
        self.seed = seed
        self.part = part
        self.readers = readers
        self.device = device
        self.feed = Feed() if feed is None else feed
        self.last_epoch = last_epoch
        self.epoch = 0
        self.n_skipped = 0
        self._mixing: HostMixing | DeviceMixing | None = None
        self._coming: _Coming | None = None

    def __len__(self) -> int:
        # The smallest process's count, at which all stop.
        return -(-(len(self.images) // self.part.of) * self.shards.spec.n_tokens // self.batch_size)

    def __iter__(self) -> Iterator[TokenBlock]:
        """The batches of `epoch` behind the first `n_skipped`; what those alone need is not read."""
        if get_worker_info() is not None:
            raise ValueError(f"MixedTokens reads with {self.readers} threads of its own; load it without workers.")
        return self._timed(self._one_epoch(len(self) - self.n_skipped))

    def close(self) -> None:
        """Give up what has been read for the next epoch."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.batches.close()

    def _one_epoch(self, n_batches: int) -> Generator[TokenBlock]:
        """The batches of `epoch` behind the first `n_skipped`; with several processes there may be one too many."""
        if n_batches <= 0:
            return
        epoch = self.epoch
        if self._coming is None or self._coming.epoch != epoch or self.n_skipped:
            self.close()
            batches = self.mixing.batches(self._chunks(epoch, self.n_skipped))
        else:
            batches, self._coming = self._coming.batches, None
        n_given = 0
        try:
            while n_given < n_batches and (batch := next(batches, None)) is not None:
                n_given += 1
                yield batch
        finally:  # whoever has counted the batches asks for none behind the last
            if n_given == n_batches and not self._is_last(epoch):
                while next(batches, None) is not None:
                    pass
                self._coming = _Coming(epoch + 1, batches)
            else:
                batches.close()

    def _chunks(self, epoch: int, n_skipped: int) -> Iterator[Chunk]:
        """Those of an epoch, but for the first `n_skipped` batches, and of all that follow it."""
        while True:
            yield from draw_chunks(
                self.images,
                self.shards.spec.n_tokens,
                images_at_once=self.buffer_images,
                batch_size=self.batch_size,
                seed=self.seed,
                epoch=epoch,
                part=self.part,
                n_skipped=n_skipped * self.batch_size,
            )
            if self._is_last(epoch):
                return
            epoch, n_skipped = epoch + 1, 0

    def _is_last(self, epoch: int) -> bool:
        return self.last_epoch is not None and epoch >= self.last_epoch

    @property
    def mixing(self) -> HostMixing | DeviceMixing:
        """Where tokens are mixed. In host memory it is kept from epoch to epoch."""
        if self._mixing is None:
            reader = RowReader(self.shards)
            n_images = largest_chunk(len(self.images[self.part.rank :: self.part.of]), self.buffer_images)
            if self.device is None:
                self._mixing = HostMixing(reader, n_images, self.batch_size, self.readers)
            else:
                self._mixing = DeviceMixing(reader, n_images, self.batch_size, self.readers, self.device)
        return self._mixing

    def _timed(self, batches: Generator[TokenBlock]) -> Iterator[TokenBlock]:
        row_bytes = self.mixing.reader.format.row_bytes
        lead = InFlightLimiter(self.device) if self.device is not None and self.device.type == "cuda" else None
        with closing(batches):
            while True:
                if lead is not None:
                    lead.wait()
                asked = time.perf_counter()
                batch = next(batches, None)
                self.feed.waited += time.perf_counter() - asked
                if batch is None:
                    return
                self.feed.n_bytes += len(batch.tokens) * row_bytes
                yield batch
