"""Mixes training tokens in the memory of the device that trains on them.

Readers copy whole images from the shards' pages to a ring of page-locked slots. From there they go to the device
beside the computation, as they are stored; a batch is gathered on the device.
Legend: B batch, N tokens of a chunk, T tokens an image, D width.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from fluxsae.mixing.memory import threads
from fluxsae.mixing.order import Chunk
from fluxsae.shards.rows import RowReader, Rows

_SLOT = 2**25
"""Bytes of a slot, about: enough for what the interpreter does about it not to matter, beside a training as well."""


class Slot(NamedTuple):
    """Host memory for some images on their way to the device, and the event of their arrival there."""

    rows: Rows
    arrival: torch.cuda.Event | None


class Filling(NamedTuple):
    """Rows of a chunk as they were stored, and the order in which they are wanted."""

    rows: Rows
    order: Int64[Tensor, "N"]
    reads: list[Future[None]]
    ends_epoch: bool


class DeviceMixing:
    """Two pieces of device memory, one gathered from while the other is filled, of `n_images` images each.

    Together they hold 2 · n_images · T tokens as they are stored: 3.2 GB for 1,024 images of 256 tokens and 3,072
    channels in bf16, half of that in fp8. Of the host's memory, slots for two more than there are readers are taken, of
    32 MB each. The order is that of `HostMixing`. It works on a CPU, too, where nothing runs beside anything.
    """

    def __init__(self, reader: RowReader, n_images: int, batch_size: int, n_readers: int, device: torch.device) -> None:
        self.reader = reader
        self.n_images = n_images
        self.batch_size = batch_size
        self.n_readers = n_readers
        self.device = torch.empty(0, device=device).device  # with its number, if it is one of several
        self.images_per_slot = min(n_images, max(1, _SLOT // reader.format.n_bytes(reader.n_tokens)))

    @property
    def n_bytes(self) -> int:
        """The device memory that it takes, but for the batches."""
        return 2 * self.reader.format.n_bytes(self.n_images * self.reader.n_tokens)

    def batches(self, chunks: Iterator[Chunk]) -> Generator[Rows | None]:
        """The tokens of all chunks in batches [B, D], and None behind an epoch's last, which may be smaller.

        ValueError for a damaged shard.
        """
        ring = Ring(self.reader, self.images_per_slot, self.n_readers + 2, self.device)
        pieces = [self._piece() for _ in range(2)]
        try:
            with threads(self.n_readers, self.device) as readers:
                yield from self._gathered(self._filled(chunks, pieces, ring, readers))
        finally:
            ring.before_computation()  # whoever gets this memory next must not use it while it is written to

    def _filled(
        self, chunks: Iterator[Chunk], pieces: Sequence[Rows], ring: Ring, readers: ThreadPoolExecutor
    ) -> Iterator[Filling]:
        """Every chunk when it is on the device; while its batches are asked for, the next one is read."""
        chunk, i = next(chunks, None), 0
        ahead = None if chunk is None else self._fill(chunk, pieces[0], ring, readers)
        while ahead is not None:
            now, ahead, chunk, i = ahead, None, next(chunks, None), i + 1
            for read in now.reads:
                read.result()
            ring.before_computation()
            if chunk is not None:  # into the other piece, from which all batches have been gathered, or will be before
                ahead = self._fill(chunk, pieces[i % 2], ring, readers)
            yield now

    def _fill(self, chunk: Chunk, piece: Rows, ring: Ring, readers: ThreadPoolExecutor) -> Filling:
        ring.after_computation()
        order = chunk.order[chunk.n_skipped :]
        order = (order.pin_memory() if ring.side is not None else order).to(self.device, non_blocking=True)
        reads = []
        for i in range(0, len(chunk.images), self.images_per_slot):
            images = chunk.images[i : i + self.images_per_slot]
            begin = i * self.reader.n_tokens
            rows = piece.part(begin, begin + len(images) * self.reader.n_tokens)
            reads.append(readers.submit(ring.carry, images, rows))
        return Filling(piece, order, reads, chunk.ends_epoch)

    def _gathered(self, fillings: Iterable[Filling]) -> Iterator[Rows | None]:
        waiting: Rows | None = None
        for rows, order, _, ends_epoch in fillings:
            begin, end = 0, self.batch_size - (0 if waiting is None else len(waiting.tokens))
            while end <= len(order):
                new = rows.taken(order[begin:end])
                yield new if waiting is None else waiting.followed_by(new)
                waiting, begin, end = None, end, end + self.batch_size
            rest = rows.taken(order[begin:])
            waiting = rest if waiting is None else waiting.followed_by(rest)
            if ends_epoch:
                if len(waiting.tokens):
                    yield waiting
                waiting = None
                yield None

    def _piece(self) -> Rows:
        n = self.n_images * self.reader.n_tokens
        memory = torch.empty(self.reader.format.n_bytes(n), dtype=torch.uint8, device=self.device)
        return self.reader.format.rows(n, memory)


class Ring:
    """Slots in which images wait for their copy to the device, on a stream of its own where there are streams."""

    def __init__(self, reader: RowReader, images_per_slot: int, n_slots: int, device: torch.device) -> None:
        self.reader = reader
        self.device = device
        on_cuda = device.type == "cuda"
        self.side = torch.cuda.Stream(device) if on_cuda else None
        self.computation = torch.cuda.current_stream(device) if on_cuda else None
        self._slots: SimpleQueue[Slot] = SimpleQueue()
        n = images_per_slot * reader.n_tokens
        for _ in range(n_slots):
            memory = torch.empty(reader.format.n_bytes(n), dtype=torch.uint8, pin_memory=on_cuda)
            # Blocking events: whoever waits for one sleeps, as the processor has other readers.
            arrival = torch.cuda.Event(blocking=True) if on_cuda else None
            self._slots.put(Slot(reader.format.rows(n, memory), arrival))

    def carry(self, images: Sequence[int], rows: Rows) -> None:
        """Read `images` and send them to `rows`, in order; waits where all slots are on their way."""
        slot = self._slots.get()
        try:
            if slot.arrival is not None and not slot.arrival.query():
                slot.arrival.synchronize()
            part = slot.rows.part(0, len(rows.tokens))
            self.reader.read_in_order(images, part)
            with torch.cuda.stream(self.side):  # does nothing where there is none
                rows.copy_(part)
                if slot.arrival is not None:
                    slot.arrival.record(self.side)
        finally:
            self._slots.put(slot)

    def after_computation(self) -> None:
        """What is sent from now on waits for what the device has been asked to compute."""
        if self.side is not None and self.computation is not None:
            self.side.wait_stream(self.computation)

    def before_computation(self) -> None:
        """What the device is asked to compute from now on waits for what has been sent."""
        if self.side is not None and self.computation is not None:
            self.computation.wait_stream(self.side)
