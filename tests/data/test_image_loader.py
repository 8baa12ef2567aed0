"""Images that are read ahead are those that are read one by one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from fluxsae.data.image_loader import ImagesAhead
from fluxsae.shards.format import Storage
from fluxsae.shards.read import ShardSet
from tests.synthetic import token_shards


@pytest.mark.parametrize("storage", ["bf16", "fp32", "fp8"])
@pytest.mark.parametrize(("size", "readers"), [(1, 3), (5, 1), (7, 2), (100, 2)])
def test_in_order_and_whole(tmp_path: Path, storage: Storage, size: int, readers: int) -> None:
    shards = token_shards(tmp_path / "tokens", storage=storage)
    wanted = [3, 4, 5, 0, 23, 11, 12, 13, 14, 15, 16]
    batches = ImagesAhead(shards, wanted, size, readers)
    kept = list(batches)  # none may be written over while somebody has it
    assert len(kept) == len(batches) and all(len(batch.images) <= size for batch in kept)
    assert torch.cat([batch.images for batch in kept]).tolist() == wanted
    assert torch.equal(torch.cat([batch.tokens() for batch in kept]), shards.tokens_batch(wanted))


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    shards = token_shards(tmp_path / "tokens")
    stored = shards.stored_tokens(7)
    path = shards.path_of(7)
    data = bytearray(path.read_bytes())
    data[stored.start : stored.start + 8] = b"\xff" * 8  # the length of its header
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00001\.tar: member 000000007\.tokens\.safetensors is damaged"):
        list(ImagesAhead(ShardSet.open(tmp_path / "tokens"), range(24), 4))


def test_stopping_early_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    batches = iter(ImagesAhead(token_shards(tmp_path / "tokens"), range(24), 2, readers=3))
    next(batches)
    assert threading.active_count() > before
    del batches
    assert threading.active_count() == before
