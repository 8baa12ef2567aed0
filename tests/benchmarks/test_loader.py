"""The benchmarks of loading and of fp8 run, at a size that says nothing of speed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import fp8, loader
from fluxsae.data.mixing.tokens import MixedTokens
from tests.synthetic import token_shards


def test_every_reader_is_measured_beside_cat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--gigabytes 0.00002 --width 16 --tokens 16 --images-per-shard 4 --batch-size 32 --buffer-images 6"
    quick = "--turns 1 --train --features 24 --k 4 --steps 3 --storage bf16 fp8"
    out = tmp_path / "loader.json"
    monkeypatch.setattr(sys, "argv", ["loader", *small.split(), *quick.split(), "--json", str(out)])
    monkeypatch.setattr(loader, "WARMUP", 2)
    loader.main()
    found = json.loads(out.read_text())
    names = [measure["name"] for measure in found["reading"]]
    assert names == [f"{s}, {r}" for s in ("bf16", "fp8") for r in ("cat", "1 reader", "2 readers")]
    assert all(measure["share_of_cat"] > 0 for measure in found["reading"])
    assert [t["name"].partition(", ")[2] for t in found["training"]] == 2 * [
        "cat",
        "loader alone",
        "step alone",
        "both together",
    ]
    assert all(training["tokens_a_second"] > 0 for training in found["training"])
    assert "of cat" in capsys.readouterr().out


def test_threads_read_for_a_device_what_another_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--without copier`, on a CPU: the same tokens, and the same complaint about a damaged shard."""
    shards = token_shards(tmp_path / "tokens", 10, 2, size=32, images_per_shard=4)

    def epoch() -> list[torch.Tensor]:
        mixed = MixedTokens(shards, range(len(shards)), batch_size=12, buffer_images=6, device=torch.device("cpu"))
        with contextlib.closing(mixed):
            return [block.decoded().clone() for block in mixed]

    expected = epoch()
    monkeypatch.setattr(loader.device, "Copier", loader.ThreadsInstead)
    assert torch.equal(torch.cat(epoch()), torch.cat(expected))
    os.truncate(shards.paths[-1], 3000)
    with pytest.raises(ValueError, match="is damaged"):
        epoch()


@pytest.mark.parametrize("more", ["", "--encoder", "--encoder --l1 0.1"])
def test_fp8_is_compared_with_what_is_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str) -> None:
    shards, out = token_shards(tmp_path / "tokens", 20, 2, size=128).folder, tmp_path / "fp8.json"
    how = "--seeds 1 --features 24 --k 4 --epochs 2 --batch-size 128 --within 1"
    monkeypatch.setattr(sys, "argv", ["fp8", str(shards), *how.split(), *more.split(), "--json", str(out)])
    with pytest.raises(SystemExit, match="0"):
        fp8.main()
    [pair] = json.loads(out.read_text())["pairs"]
    assert pair["seed"] == 1 and pair["fve"] != pair["fve_fp8"] and abs(pair["fve"] - pair["fve_fp8"]) < 0.05
