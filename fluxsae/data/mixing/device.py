"""Mixes training tokens in the memory of the device that trains on them.

Another process copies whole images from the shards' pages to a ring of page-locked slots. From there they go to the
device beside the computation, as they are stored; a batch is gathered on the device. What this process does about it is
a few calls a batch, made when the batch is asked for.
Legend: B batch, I images, N tokens of a chunk, T tokens an image, D width.
"""

from __future__ import annotations

import mmap
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from fluxsae.data.mixing.copier import SPAN, Copier
from fluxsae.data.mixing.memory import threads
from fluxsae.data.mixing.order import Chunk
from fluxsae.shards import RowReader, TokenBlock

if _HAS_TRITON := find_spec("triton") is not None:
    from fluxsae.kernels import gathering as kernels

_SLOT = 2**24
"""Bytes of a slot, about: enough for what the interpreter does about it not to matter."""
_AHEAD = 3
"""Batches that may be asked for before the device is done with what was launched before the first of them."""
_SPANS = np.dtype([("file", "<u4"), ("offset", "<u8"), ("target", "<u8"), ("size", "<u8")])
assert _SPANS.itemsize == SPAN.size


class InFlightLimiter:
    """Keeps whoever asks for batches from running further ahead of a CUDA device than keeps that busy.

    Now and then a training waits for the device, to log or to count dead features. Nothing is read meanwhile, as that
    happens when a batch is asked for; so it must not have a whole chunk's steps to wait for.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._asked: deque[torch.cuda.Event] = deque()

    def wait(self) -> None:
        """Until the device is done with what was launched before the call `_AHEAD` calls ago."""
        event = self._asked.popleft() if len(self._asked) == _AHEAD else torch.cuda.Event(blocking=True)
        event.synchronize()
        event.record(self._stream)
        self._asked.append(event)


class Located(NamedTuple):
    """Images of a chunk, where they lie (see `RowReader.located`), and in which order tokens are wanted."""

    images: list[int]
    places: Int64[np.ndarray, "I 3"]
    order: Int64[Tensor, "N"]
    ends_epoch: bool


class DeviceFilling(NamedTuple):
    """Rows of a chunk as they were stored, and the order in which they are wanted."""

    rows: TokenBlock
    order: Int64[Tensor, "N"]
    ends_epoch: bool


class DeviceMixing:
    """Two pieces of device memory, one gathered from while the other is filled, of `n_images` images each.

    Together they hold 2 · n_images · T tokens as they are stored: 4.0 GB for 1,280 images of 256 tokens and 3,072
    channels in bf16, half of that in fp8. Of the host's memory, two slots are taken for each reader and two more, of
    16 MB each. The order is that of `HostMixing`. It works on a CPU, too, where copies run beside nothing.
    """

    def __init__(self, reader: RowReader, n_images: int, batch_size: int, n_readers: int, device: torch.device) -> None:
        self.reader = reader
        self.n_images = n_images
        self.batch_size = batch_size
        self.n_readers = n_readers
        self.device = torch.empty(0, device=device).device  # with its number, if it is one of several
        self._decodes = _HAS_TRITON and self.device.type == "cuda" and torch.version.hip is None
        self.images_per_slot = min(n_images, max(1, _SLOT // reader.format.n_bytes(reader.n_tokens)))

    @property
    def n_bytes(self) -> int:
        """The device memory that it takes, but for the batches."""
        return 2 * self.reader.format.n_bytes(self.n_images * self.reader.n_tokens)

    def batches(self, chunks: Iterator[Chunk]) -> Generator[TokenBlock | None]:
        """The tokens of all chunks in batches [B, D], and None behind an epoch's last, which may be smaller.

        ValueError for a damaged shard.
        """
        pieces = [self._piece() for _ in range(2)]
        with closing(Ring(self.reader, self.images_per_slot, self.n_readers, self.device)) as ring:
            yield from self._gathered(self._filled(chunks, pieces, ring), ring)

    def _filled(self, chunks: Iterator[Chunk], pieces: Sequence[TokenBlock], ring: Ring) -> Iterator[DeviceFilling]:
        """Every chunk when it is on the device; while its batches are asked for, the next one is read."""

        def next_located() -> Located | None:
            chunk = next(chunks, None)
            if chunk is None:
                return None
            order = chunk.order[chunk.n_skipped :]
            order = order.pin_memory() if ring.side is not None else order
            return Located(chunk.images, self.reader.located(chunk.images), order, chunk.ends_epoch)

        with threads(1) as beside:  # to draw a permutation, and find images, takes longer than a step
            found, coming, i = next_located(), beside.submit(next_located), 0
            ahead = None if found is None else self._fill(found, pieces[0], ring)
            while ahead is not None:
                ring.finish()
                now, found, i = ahead, coming.result(), i + 1
                coming = beside.submit(next_located)
                # Into the other piece, from which all batches have been gathered, or will be before.
                ahead = None if found is None else self._fill(found, pieces[i % 2], ring)
                yield now

    def _fill(self, found: Located, piece: TokenBlock, ring: Ring) -> DeviceFilling:
        n_tokens, order = self.reader.n_tokens, found.order.to(self.device, non_blocking=True)
        ring.after_computation()
        for i in range(0, len(found.images), self.images_per_slot):
            images = found.images[i : i + self.images_per_slot]
            rows = piece.part(i * n_tokens, (i + len(images)) * n_tokens)
            ring.put(Job(images, found.places[i : i + len(images)], rows))
        return DeviceFilling(piece, order, found.ends_epoch)

    def _gathered(self, fillings: Iterable[DeviceFilling], ring: Ring) -> Iterator[TokenBlock | None]:
        waiting: TokenBlock | None = None
        for rows, order, ends_epoch in fillings:
            begin, end = 0, self.batch_size - (0 if waiting is None else len(waiting.tokens))
            while end <= len(order):
                new = self._taken(rows, order[begin:end])
                ring.go_on()
                yield new if waiting is None else waiting.followed_by(new)
                waiting, begin, end = None, end, end + self.batch_size
            rest = self._taken(rows, order[begin:])
            waiting = rest if waiting is None else waiting.followed_by(rest)
            if ends_epoch:
                if len(waiting.tokens):
                    yield waiting
                waiting = None
                yield None

    def _taken(self, rows: TokenBlock, index: Int64[Tensor, "B"]) -> TokenBlock:
        """Some rows as new ones; fp8 comes decoded where a kernel does that on the way."""
        if rows.scale is None or not self._decodes:
            return rows.taken(index)
        with torch.cuda.device_of(index):  # where a kernel is launched, whatever its tensors
            return TokenBlock(kernels.gather_decoded(rows.tokens, rows.scale, index), None)

    def _piece(self) -> TokenBlock:
        n = self.n_images * self.reader.n_tokens
        memory = torch.empty(self.reader.format.n_bytes(n), dtype=torch.uint8, device=self.device)
        return self.reader.format.rows(n, memory)


class Slot(NamedTuple):
    """Host memory for some images on their way to the device, and the event of their arrival there."""

    number: int
    rows: TokenBlock
    arrival: torch.cuda.Event | None


class Job(NamedTuple):
    """Images that lie at `places`, wanted in `rows`, one after the other."""

    images: Sequence[int]
    places: Int64[np.ndarray, "I 3"]
    rows: TokenBlock


class Ring:
    """Slots that another process fills; from each, images go to the device, on a stream of its own where there are any.

    Everything that this process does about them happens within `put`, `go_on` and `finish`.
    """

    def __init__(self, reader: RowReader, images_per_slot: int, n_readers: int, device: torch.device) -> None:
        self.reader = reader
        on_cuda = device.type == "cuda"
        self.side = torch.cuda.Stream(device) if on_cuda else None
        self.computation = torch.cuda.current_stream(device) if on_cuda else None
        n_rows = images_per_slot * reader.n_tokens
        n_bytes = -(-reader.format.n_bytes(n_rows) // mmap.PAGESIZE) * mmap.PAGESIZE
        n_slots = 2 * n_readers + 2  # for those that read, those that wait for them, and those on their way
        self._copier = Copier(reader.shards.paths, n_slots * n_bytes, n_readers)
        self._memory = torch.frombuffer(self._copier.memory, dtype=torch.uint8)
        self._locked = on_cuda and _lock(self._memory)
        self._free: list[Slot] = []
        for i in range(n_slots):
            rows = reader.format.rows(n_rows, self._memory[i * n_bytes :])
            self._free.append(Slot(i, rows, torch.cuda.Event(blocking=True) if on_cuda else None))
        self._waiting: deque[Job] = deque()
        self._reading: dict[int, tuple[Slot, Job]] = {}
        self._leaving: deque[Slot] = deque()

    def put(self, job: Job) -> None:
        """Have images read and sent after all that were put before."""
        self._waiting.append(job)
        self._read_more()

    def go_on(self, wait: bool = False) -> None:
        """Send what has been read, and have more read; `wait` until there is something to do."""
        if wait and not self._reading and self._leaving and (arrival := self._leaving[0].arrival) is not None:
            arrival.synchronize()
        done = self._copier.done(wait and bool(self._reading))
        with torch.cuda.stream(self.side):  # does nothing where there is none
            for number, whole in done:
                slot, job = self._reading.pop(number)
                part = slot.rows.part(0, len(job.rows.tokens))
                if not whole:
                    self.reader.read_in_order(job.images, part)  # which tells what is wrong
                job.rows.copy_(part)
                if slot.arrival is not None:
                    slot.arrival.record(self.side)
                self._leaving.append(slot)
        self._read_more()

    def finish(self) -> None:
        """Return when all that was put is on its way; what the device computes from now on waits for it."""
        while self._waiting or self._reading:
            self.go_on(wait=True)
        self._before_computation()

    def after_computation(self) -> None:
        """What is sent from now on waits for what the device has been asked to compute."""
        if self.side is not None and self.computation is not None:
            self.side.wait_stream(self.computation)

    def close(self) -> None:
        """Give the slots back. Whoever gets the device's memory next will not find it written to."""
        self._copier.close()
        self._before_computation()
        if self.side is not None:
            self.side.synchronize()
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())

    def _before_computation(self) -> None:
        if self.side is not None and self.computation is not None:
            self.computation.wait_stream(self.side)

    def _read_more(self) -> None:
        while self._leaving and (self._leaving[0].arrival is None or self._leaving[0].arrival.query()):
            self._free.append(self._leaving.popleft())
        while self._waiting and self._free:
            slot, job = self._free.pop(), self._waiting.popleft()
            self._reading[slot.number] = slot, job
            self._copier.read(slot.number, self._spans(slot, job))

    def _spans(self, slot: Slot, job: Job) -> bytes:
        """What of which file goes where in a slot: tokens, then scales where there are any."""
        n = len(job.images)
        parts = [(one, at) for one, at in ((slot.rows.tokens, 1), (slot.rows.scale, 2)) if one is not None]
        spans = np.empty((len(parts), n), _SPANS)
        spans["file"] = job.places[:, 0]
        for (one, at), of in zip(parts, spans, strict=True):
            of["size"] = size = one[0].nbytes * self.reader.n_tokens
            of["offset"] = job.places[:, at]
            of["target"] = one.data_ptr() - self._memory.data_ptr() + size * np.arange(n)
        return spans.tobytes()


def _lock(memory: Tensor) -> bool:
    """Lock pages in memory, to be copied beside the computation; False, with a warning, where that is refused."""
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(error):
        warnings.warn(
            f"{memory.nbytes / 1e6:.0f} MB of host memory could not be page-locked (CUDA error {int(error)}): the "
            "training waits for its copies; raise the limit on locked memory (ulimit -l), or take fewer readers.",
            stacklevel=2,
        )
    return not int(error)
