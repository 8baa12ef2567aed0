"""The benchmark of S and maps runs at a small size, and what it says adds up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.full_size import scores

SMALL = "--device cpu --precision 32-true --width 16 --features 32 --k 4 --tokens 16 --batch 8 --images 20 --calls 1"


def measured(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> list[dict[str, float]]:
    files = ["--images-per-shard", "8", "--folder", str(folder), "--json", str(folder / "scores.json")]
    monkeypatch.setattr(sys, "argv", ["scores", *SMALL.split(), *files, *more])
    scores.main()
    found: list[dict[str, float]] = json.loads((folder / "scores.json").read_text())["results"]
    return found


def test_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    resident, streamed = measured(monkeypatch, tmp_path, "--kinds", "TopK", "--turns", "1")
    assert resident["share"] == pytest.approx(resident["pooled"] / resident["product"])
    assert streamed["share"] == pytest.approx(streamed["scored"] / streamed["read"])
    assert 16 <= streamed["n_maps"] <= 16 * 32


def test_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = measured(monkeypatch, tmp_path, "--curve", "5", "12", "--kinds", "L1")
    assert [point["n_images"] for point in found] == [5, 12] and all(point["megabytes"] > 1 for point in found)
