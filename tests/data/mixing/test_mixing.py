"""Mixing in host memory and on a device: the same tokens in the same order, and memory that nobody loses."""

from __future__ import annotations

import errno
import os
import threading
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from fluxsae.data.activations import ActivationData
from fluxsae.data.image_loader import ImagesAhead
from fluxsae.data.mixing.copier import Copier
from fluxsae.data.mixing.device import _AHEAD, InFlightLimiter
from fluxsae.data.mixing.memory import Recycled
from fluxsae.data.mixing.order import WHOLE, Part, draw_chunks, largest_chunk
from fluxsae.data.mixing.tokens import MixedTokens
from fluxsae.shards import ShardSet
from fluxsae.shards.format import Storage
from fluxsae.shards.token_blocks import RowReader, TokenBlock
from tests.synthetic import token_shards

CPU = torch.device("cpu")
GPU = torch.device("cuda", max(0, torch.cuda.device_count() - 1))
"""The last one: threads begin with the first as theirs."""
ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DEVICES = [None, CPU, pytest.param(GPU, marks=ON_GPU)]


@pytest.fixture(scope="module", params=["bf16", "fp32", "fp8"])
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return token_shards(tmp_path_factory.mktemp("tokens"), 12, 2, storage=request.param)


def plain_batches(
    shards: ShardSet, n_images: int, buffer_images: int, batch_size: int, part: Part = WHOLE, epoch: int = 1
) -> tuple[Tensor, ...]:
    """The tokens in the order that the chunks tell, one after the other, in batches."""
    how = {"images_at_once": buffer_images, "batch_size": batch_size, "seed": 3, "epoch": epoch, "part": part}
    chunks = draw_chunks(range(n_images), shards.spec.n_tokens, **how)
    tokens = torch.cat([shards.tokens_batch(chunk.images).flatten(0, 1)[chunk.order] for chunk in chunks])
    return tokens.split(batch_size)


@pytest.mark.parametrize(
    ("n_images", "at_once", "wanted"), [(24, 10, 8), (24, 24, 24), (7, 3, 3), (5, 9, 5), (1, 4, 1)]
)
def test_an_epoch_is_dealt_out_evenly(n_images: int, at_once: int, wanted: int) -> None:
    """Behind a chunk of a few images, the next one would have to be read while their few batches are trained on."""
    chunks = draw_chunks(range(n_images), 4, images_at_once=at_once, batch_size=5, seed=0, epoch=0)
    sizes = [len(chunk.images) for chunk in chunks]
    assert sum(sizes) == n_images and max(sizes) == wanted == largest_chunk(n_images, at_once)
    assert min(sizes) >= wanted - 1


HOW = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 100),
        "buffer_images": st.integers(1, 30),
        "readers": st.integers(1, 3),
        "device": st.sampled_from([None, CPU]),
    }
)
"""Ways to mix."""


@settings(max_examples=60, deadline=None)
@given(n_images=st.integers(3, 24), how=HOW, rank=st.integers(0, 2), n_skipped=st.integers(0, 5))
def test_the_order_is_the_plain_one_however_it_is_read(
    shards: ShardSet, n_images: int, how: dict[str, Any], rank: int, n_skipped: int
) -> None:
    part = Part(rank, 3)
    data = MixedTokens(shards, range(n_images), seed=3, part=part, **how)
    data.epoch, data.n_skipped = 1, min(n_skipped, len(data))
    expected = plain_batches(shards, n_images, how["buffer_images"], how["batch_size"], part)[: len(data)]
    batches = list(data)  # all held at a time: none may be written over
    assert len(batches) == len(data) - data.n_skipped
    for batch, wanted in zip(batches, expected[data.n_skipped :], strict=True):
        assert torch.equal(batch.decoded(), wanted)


@settings(max_examples=40, deadline=None)
@given(
    n_images=st.integers(2, 24),
    how=HOW,
    rank=st.integers(0, 1),
    n_skipped=st.integers(0, 5),
    asks_behind_the_last=st.booleans(),
    gives_up=st.booleans(),
)
def test_epochs_that_follow_each_other_are_those_alone(
    shards: ShardSet,
    n_images: int,
    how: dict[str, Any],
    rank: int,
    n_skipped: int,
    asks_behind_the_last: bool,
    gives_up: bool,
) -> None:
    part, before = Part(rank, 2), threading.active_count()
    data = MixedTokens(shards, range(n_images), seed=3, part=part, last_epoch=3, **how)
    for epoch in (1, 2, 2, 3):
        data.epoch, data.n_skipped = epoch, min(n_skipped, len(data)) if epoch == 1 else 0
        expected = plain_batches(shards, n_images, how["buffer_images"], how["batch_size"], part, epoch)
        expected = expected[data.n_skipped : len(data)]
        if gives_up and epoch == 2:
            expected = expected[: len(expected) // 2]
        batches = list(data) if asks_behind_the_last else list(islice(data, len(expected)))
        for batch, wanted in zip(batches, expected, strict=not (gives_up and asks_behind_the_last)):
            assert torch.equal(batch.decoded(), wanted)
    assert threading.active_count() == before  # nothing is read ahead of the last epoch


@pytest.mark.parametrize("device", DEVICES)
def test_the_next_epoch_is_read_while_the_last_images_are_handed_out(
    shards: ShardSet, device: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, read = threading.active_count(), []
    name = "_find" if device is None else "located"
    find = getattr(RowReader, name)
    monkeypatch.setattr(RowReader, name, lambda reader, found: read.extend(np.atleast_1d(found)) or find(reader, found))
    data = MixedTokens(shards, range(24), batch_size=40, buffer_images=12, device=device, last_epoch=9)
    batches = list(islice(data, len(data)))
    data.epoch = 1
    ahead = iter(data)
    next(ahead)
    assert len(batches) == len(data) and len(read) in range(36, 61)  # of two chunks an epoch, one or two ahead
    ahead.close()
    assert threading.active_count() == before
    data.epoch = 0
    list(data)
    data.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_stays_while_the_next_is_asked_for(shards: ShardSet, device: torch.device | None) -> None:
    data = MixedTokens(shards, range(24), batch_size=40, buffer_images=3, seed=3, device=device)
    expected = iter(plain_batches(shards, 24, 3, 40))
    data.epoch = 1
    last: TokenBlock | None = None
    for batch in data:
        assert last is None or torch.equal(last.decoded().cpu(), next(expected))
        last = batch
    assert data.feed.n_bytes == 24 * 16 * data.mixing.reader.format.row_bytes and data.feed.waited > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("storage", ["bf16", "fp32", "fp8"])
def test_a_gpu_mixes_as_the_host_does(tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """With slots that are used many times over, and a device that is busy with other things and far behind the host."""
    monkeypatch.setattr("fluxsae.data.mixing.device._SLOT", 2**18)
    shards = token_shards(tmp_path, 40, 2, size=256, d_in=256, storage=storage)
    host, gpu = (
        MixedTokens(shards, range(80), batch_size=300, buffer_images=23, readers=4, device=device)
        for device in (None, GPU)
    )
    for epoch in range(3):
        host.epoch = gpu.epoch = epoch
        found = []
        for batch in gpu:
            with torch.cuda.device(GPU):
                torch.cuda._sleep(3_000_000)  # cycles: longer than it takes to read what a batch holds
            found.append(batch.decoded())
        for batch, wanted in zip(found, host, strict=True):
            assert batch.device == GPU and torch.equal(batch.cpu(), wanted.decoded())


def test_a_lead_waits_for_what_was_launched_some_calls_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    """With events that tell which call recorded them, and whether someone waited for that."""
    waited, calls = [], iter(range(100))

    class Event:
        recorded: int | None = None

        def __init__(self, blocking: bool) -> None:
            assert blocking  # or a processor would be busy with waiting

        def record(self, stream: str) -> None:
            self.recorded = next(calls)

        def synchronize(self) -> None:
            waited.append(self.recorded)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    lead = InFlightLimiter(GPU)
    for _ in range(_AHEAD + 4):
        lead.wait()
    assert waited == [None] * _AHEAD + [0, 1, 2, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_whoever_asks_a_gpu_for_batches_stays_close_to_it(tmp_path: Path) -> None:
    shards = token_shards(tmp_path, 40, 2, size=256, d_in=256)
    steps, behind = [], []
    for _ in MixedTokens(shards, range(80), batch_size=300, buffer_images=80, device=GPU):
        with torch.cuda.device(GPU):
            torch.cuda._sleep(20_000_000)  # cycles: far longer than a batch takes to make
            steps.append(torch.cuda.Event())
            steps[-1].record()
        behind.append(sum(not step.query() for step in steps))
    assert len(behind) > 20 and max(behind) == _AHEAD + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_given_up_epoch_is_not_written_to_any_more(tmp_path: Path) -> None:
    shards = token_shards(tmp_path, 40, 2, size=256, d_in=256)
    for _ in range(10):
        data = MixedTokens(shards, range(80), batch_size=300, buffer_images=23, device=GPU)
        batches = iter(data)
        next(batches)
        n_bytes = data.mixing.n_bytes // 2  # of a piece, which the allocator will give to the next to ask for as much
        del batches
        pieces = [torch.zeros(n_bytes, dtype=torch.uint8, device=GPU) for _ in range(2)]
        torch.cuda.synchronize(GPU)
        assert not any(bool(piece.any()) for piece in pieces)


def test_fp8_that_was_converted_on_its_way_decodes_alike(tmp_path: Path) -> None:
    """A Trainer in bf16-true converts all floating-point tensors of a batch before it hands them on."""
    [rows] = MixedTokens(token_shards(tmp_path, 2, 1, storage="fp8"), range(2), batch_size=32)
    assert rows.scale is not None
    converted = TokenBlock(rows.tokens.bfloat16(), rows.scale.bfloat16())
    assert torch.equal(converted.decoded(), rows.decoded())


def test_memory_is_used_again_when_its_last_batch_is_dropped() -> None:
    memory = Recycled(64, 2)
    first, second = memory.take(), memory.take()
    address, part = first.data_ptr(), first[8:16]
    assert not memory.has_room()
    del first
    assert not memory.has_room() and part.numel() == 8
    del part
    assert memory.has_room() and memory.take().data_ptr() == address
    del second


def test_an_epoch_that_is_given_up_leaves_no_thread_behind(shards: ShardSet) -> None:
    before = threading.active_count()
    batches = iter(MixedTokens(shards, range(24), batch_size=16, buffer_images=2))
    next(batches)
    assert threading.active_count() > before
    del batches
    assert threading.active_count() == before


@pytest.mark.parametrize("batch_size", [7, 1, 1000])
def test_a_token_s_batch_is_drawn_and_batches_are_as_they_lie(batch_size: int) -> None:
    """Batches go on from chunk to chunk, each with tokens of many images, which lie together there."""
    images, n_tokens = [70, 30, 90, 10, 20, 40, 60, 80], 40
    chunks = list(draw_chunks(images, n_tokens, images_at_once=4, batch_size=batch_size, seed=0, epoch=0))
    assert [len(chunk.images) for chunk in chunks] == [4, 4] and all(c.images == sorted(c.images) for c in chunks)
    begin = 0
    for chunk in chunks:
        order = chunk.order.tolist()
        assert sorted(order) == list(range(4 * n_tokens))
        ends = [0, *range(batch_size - begin % batch_size, len(order), batch_size), len(order)]
        batches = [order[a:b] for a, b in pairwise(ends)]
        assert all(batch == sorted(batch) for batch in batches)
        begin += len(order)
        if batch_size == 1000:
            continue
        of_whole = [{token // n_tokens for token in batch} for batch in batches if len(batch) == batch_size]
        assert sum(map(len, of_whole)) / len(of_whole) > min(batch_size, 4) * 0.7
        assert order != sorted(order)


def test_worker_processes_are_refused(shards: ShardSet) -> None:
    data = MixedTokens(shards, range(24), batch_size=16)
    with pytest.raises(ValueError, match="load it without workers"):
        list(DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork"))


def test_a_device_buffer_wants_a_device(shards: ShardSet) -> None:
    with pytest.raises(ValueError, match="needs a CUDA device"):
        ActivationData(shards.folder, device_buffer=True).train_dataloader()


def tokens_at(shards: ShardSet, image: int) -> int:
    """Where the tokens of an image begin in their shard."""
    stored = shards.stored_tokens(image)
    return stored.start + stored.layout.tokens


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("storage", "bits"), [("bf16", b"\xc0\x7f"), ("fp32", b"\0\0\xc0\x7f"), ("fp8", b"\xff")])
def test_nan_on_disk_reaches_the_training(
    tmp_path: Path, storage: Storage, bits: bytes, device: torch.device | None
) -> None:
    shards = token_shards(tmp_path, 12, 2, storage=storage)
    with shards.path_of(7).open("r+b") as tar:
        tar.seek(tokens_at(shards, 7))
        tar.write(bits)
    found = torch.cat([batch.decoded() for batch in MixedTokens(shards, range(24), batch_size=40, device=device)])
    assert int(found.isnan().sum()) == 1
    assert "image 7 in" in str(shards.first_not_finite(range(24)))


@pytest.mark.parametrize("device", DEVICES)
def test_a_shard_that_loses_its_end_while_it_is_read(tmp_path: Path, device: torch.device | None) -> None:
    shards = token_shards(tmp_path, 12, 2)
    cut = tokens_at(shards, 23) + 100
    data = MixedTokens(shards, range(24), batch_size=40, device=device)
    list(data)
    os.truncate(shards.path_of(23), cut)
    with pytest.raises(ValueError, match=r"shard-00004\.tar: member 000000023\.tokens.* is damaged: it is cut short"):
        list(data)


@pytest.mark.parametrize("storage", ["bf16", "fp8"])
def test_a_file_system_that_gives_less_than_it_is_asked_for(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, read = token_shards(tmp_path, 12, 2, storage=storage), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, pieces, offset: read(fd, [pieces[0][:7]], offset))
    expected = shards.tokens_batch(range(24))
    [batch] = ImagesAhead(shards, range(24), 24)
    assert torch.equal(batch.tokens(), expected)
    mixed = torch.cat([batch.decoded() for batch in MixedTokens(shards, range(24), batch_size=40)])
    assert torch.equal(mixed.sort(dim=0).values, expected.flatten(0, 1).sort(dim=0).values)


def test_a_disk_that_fails_is_an_error(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(OSError, match="Input/output error"):
        list(MixedTokens(shards, range(24), batch_size=40))
    with pytest.raises(OSError, match="Input/output error"):
        list(ImagesAhead(shards, range(24), 24))


def test_what_the_other_process_cannot_read_is_read_here(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    done = Copier.done
    monkeypatch.setattr(Copier, "done", lambda copier, wait: [(number, False) for number, _ in done(copier, wait)])
    data = MixedTokens(shards, range(24), batch_size=40, seed=3, device=CPU)
    data.epoch = 1
    found = torch.cat([batch.decoded() for batch in data])
    assert torch.equal(found, torch.cat(plain_batches(shards, 24, 1024, 40)))


@pytest.mark.parametrize("device", DEVICES)
def test_a_damaged_header_ends_in_a_sentence(tmp_path: Path, device: torch.device | None) -> None:
    shards = token_shards(tmp_path, 12, 2)
    with shards.path_of(3).open("r+b") as tar:
        tar.seek(shards.stored_tokens(3).start + 9)
        tar.write(b"\xff")
    with pytest.raises(ValueError, match=r"member 000000003\.tokens\.safetensors is damaged"):
        list(MixedTokens(ShardSet.open(tmp_path), range(24), batch_size=40, device=device))
