"""Whole images from shards, in order, read ahead by threads and decoded where they are used.

Legend: B images of a batch, T tokens an image, N = B · T tokens, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import IterableDataset

from fluxsae.data.mixing.memory import Recycled, threads
from fluxsae.shards import RowReader, ShardSet, TokenBlock


class StoredImages(NamedTuple):
    """All tokens of some images as they are stored, and which images they are."""

    rows: TokenBlock
    images: Int[Tensor, "B"]

    def tokens(self) -> Float[Tensor, "B T D"]:
        """The tokens themselves; for fp8 new ones, in bf16."""
        return self.rows.decoded().unflatten(0, (len(self.images), -1))


class ImagesAhead(IterableDataset[StoredImages]):
    """Batches of `images_per_batch` images in order; while one is used, threads read those that come next.

    Page-locked memory is filled where a GPU wants the batches, so that they go there without another copy; otherwise
    memory that is used again, once nobody has a batch of it. ValueError, as from `ShardSet.tokens`, for a damaged one.
    """

    def __init__(
        self, shards: ShardSet, images: Sequence[int], images_per_batch: int, readers: int = 2, *, pinned: bool = False
    ) -> None:
        self.shards = shards
        self.images = list(images)
        self.images_per_batch = images_per_batch
        self.readers = readers
        self.pinned = pinned

    def __len__(self) -> int:
        return -(-len(self.images) // self.images_per_batch)

    def __iter__(self) -> Iterator[StoredImages]:
        reader = RowReader(self.shards)
        memory = Recycled(reader.format.n_bytes(self.images_per_batch * reader.n_tokens), self.readers + 2)
        ahead: deque[Future[StoredImages]] = deque()
        with threads(self.readers) as pool:
            for begin in range(0, len(self.images), self.images_per_batch):
                piece = (
                    torch.empty(memory.n_bytes, dtype=torch.uint8, pin_memory=True) if self.pinned else memory.take()
                )
                images = self.images[begin : begin + self.images_per_batch]
                ahead.append(pool.submit(_read, reader, images, piece))
                del piece  # so that only the batch holds it
                if len(ahead) > self.readers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()


def _read(reader: RowReader, images: list[int], memory: Tensor) -> StoredImages:
    rows = reader.format.rows(len(images) * reader.n_tokens, memory)
    reader.read_in_order(images, rows)
    return StoredImages(rows, torch.tensor(images))
