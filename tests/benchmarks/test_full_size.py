"""The benchmark at full size, run small."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.full_size.__main__ import main as run_all
from benchmarks.full_size.capture import main
from benchmarks.full_size.model import FULL, TINY, write_frame
from benchmarks.full_size.processes import run_together
from fluxsae.models.load import load_frame, transformer_skeleton


def test_the_full_frame_is_flux_1_dev(tmp_path: Path) -> None:
    """11,901,408,320 weights: 23.8 GB in bf16."""
    folder = write_frame(tmp_path / "full", FULL)
    skeleton = transformer_skeleton(folder)
    assert sum(weight.numel() for weight in skeleton.parameters()) == 11_901_408_320
    assert skeleton.config.guidance_embeds and load_frame(folder).scheduler.config.use_dynamic_shifting
    assert len(transformer_skeleton(write_frame(tmp_path / "tiny", TINY)).transformer_blocks) == 16


@pytest.mark.slow
def test_the_captures_beside_the_plain_loop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    main(["--tiny", "--plain", "1", "--prompts", "1", "--batch-size", "4", "--json", str(path)])
    found = json.loads(path.read_text())
    names = ["plain loop", "tokens", "tokens and images", "3 sites × 3 steps"]
    assert [result["name"] for result in found["results"]] == names and found["torch"] == torch.__version__
    assert all(result["ratio"] > 0 for result in found["results"])
    assert "3 sites × 3 steps takes" in capsys.readouterr().out
    monkeypatch.setitem(TINY.transformer, "num_single_layers", 20)  # all of which a card of 24 GB leaves on the host
    sizes = ["--pixels", "32", "--prompts", "1"]
    main(["--tiny", "--card", "24", "40", "--schnell", *sizes, "--only", "images", "--json", str(path)])
    names = ["tokens and images, 24 GB", "tokens and images, 40 GB"]
    assert [result["name"] for result in json.loads(path.read_text())["results"]] == names


@pytest.mark.slow
def test_a_capture_by_two_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    sizes = ["--pixels", "32", "--prompts", "1", "--batch-size", "4", "--only", "tokens"]
    main(["--tiny", "--gpus", "2", *sizes, "--json", str(path)])
    [found] = json.loads(path.read_text())["results"]
    assert (found["name"], found["n_images"], found["ratio"]) == ("tokens, 2 GPUs", 8, 1.0)
    assert capfd.readouterr().out.count("tokens, 2 GPUs") == 1


def test_when_one_process_fails_the_others_are_ended() -> None:
    began = time.monotonic()
    script = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)"
    with pytest.raises(RuntimeError, match="one of 2 processes ended with code 3"):
        run_together([sys.executable, "-c", script], 2)
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_all_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    sizes = ["--plain", "1", "--prompts", "1", "--study", "10", "--batch-size", "24"]
    run_all(["--tiny", *sizes, "--folder", str(tmp_path), "--json", str(path)])
    found = json.loads(path.read_text())
    assert [one["n_images"] for one in found["captures"]] == [1, 4, 4, 40]
    tokens, images, maps = (one["n"] for one in found["stages"])
    assert 0 < tokens <= 2 * 40 * 16 and images == 40 and maps >= 16  # 16 images of a feature
    assert all(one["seconds"] > 0 and one["host_gigabytes"] > 0 for one in found["stages"])
    assert [one["share"] > 0 for one in found["scores"]] == [True] * 4
    assert "10,000 images" in capsys.readouterr().out and not list(tmp_path.glob("tmp*"))
