"""What a capture will take on disk, and how far it is."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from unittest import mock

import pytest

from fluxsae.capture.folder import check_space, token_bytes
from fluxsae.capture.progress import CaptureProgress, ProgressLog
from fluxsae.cli.trainer import TrainerCLI

FLUX_DEV = Path(__file__).parents[2] / "configs" / "flux-dev"


def test_an_image_s_tokens_take_what_the_format_says() -> None:
    """FLUX.1-dev at 256×256: 256 tokens of 3072 channels; an fp8 token also has a float32 scale."""
    rest = token_bytes(0, 3072, "bf16")
    assert token_bytes(256, 3072, "bf16") - rest == 256 * 6144
    assert token_bytes(256, 3072, "fp32") - rest == 256 * 12288
    assert token_bytes(256, 3072, "fp8") - rest == 256 * (3072 + 4)


def test_a_disk_without_room_is_told_of_with_both_values(tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=20_000_000_000)
    with mock.patch.object(shutil, "disk_usage", return_value=usage):
        check_space(tmp_path / "not" / "yet", [15_700_000_000, 4_300_000_000])
        with pytest.raises(ValueError, match=r"no room left for .*yet: it would take about 31.4 GB .* has 20 GB"):
            check_space(tmp_path / "not" / "yet", [15_700_000_000] * 2)


def test_progress_says_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    said = str(CaptureProgress(n_made=100, n_images=1000, n_tokens=25600, n_bytes=157_000_000, seconds=60.0))
    assert said == "100 of 1,000 images, 1.67 images/s, 427 tokens/s, 0.157 GB written, 9 min left"
    caplog.set_level(logging.INFO, "fluxsae")
    ProgressLog(every=3600.0).show(1, 2, 3, 4)
    assert not caplog.records
    ProgressLog(every=0.0).show(1, 2, 3, 4)
    assert caplog.records[0].message.startswith("1 of 2 images")


@pytest.mark.parametrize(("card", "n_offloaded", "keep"), [("24GB", 20, True), ("40GB", 0, True), ("80GB", 0, False)])
def test_a_card_s_settings_go_on_top_of_the_capture_s(card: str, n_offloaded: int, keep: bool) -> None:
    parser_only = type("ParserOnly", (TrainerCLI,), {"instantiate_classes": lambda self: None})
    files = [FLUX_DEV / "capture.yaml", FLUX_DEV / "memory" / f"{card}.yaml"]
    arguments = [word for path in files for word in ("-c", str(path))]
    config = parser_only.start("predict", arguments, run=False).config  # type: ignore[attr-defined]
    made = config.model.init_args
    assert (made.offload_blocks, made.keep_embeddings) == (n_offloaded, keep)
    assert made.sites == ["transformer_blocks.15.ff"] and config.data.init_args.repetitions == 4
