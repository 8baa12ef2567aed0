"""Overlays lie where the codes are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxsae.figures.contact_sheet import contact_sheet, sheet_rows
from fluxsae.files.tables import read_csv
from fluxsae.records.features import Selection, read_features
from fluxsae.scoring.analyses.alive import AliveStatistics
from fluxsae.scoring.analyses.overlays import Overlays, clip_value, overlay, read_overlays, scales
from fluxsae.scoring.analyses.top_images import TopImages
from fluxsae.scoring.map_files import MapFile
from fluxsae.scoring.maps import FeatureMapping
from tests.scoring.study import make_study, run


@pytest.mark.parametrize("mode", ["smooth", "patch"])
def test_colour_lies_on_the_active_token(mode: str) -> None:
    codes = np.zeros((2, 4), dtype=np.float32)
    codes[1, 2] = 3.0
    laid = np.asarray(overlay(Image.new("RGB", (64, 32), "grey"), codes, 3.0, mode)).astype(float)  # type: ignore[arg-type]
    plain = np.asarray(overlay(Image.new("RGB", (64, 32), "grey"), np.zeros_like(codes), 0.0, mode))  # type: ignore[arg-type]
    changed = np.abs(laid - plain).sum(axis=2)
    assert np.unravel_index(changed.argmax(), changed.shape)[0] >= 16 and changed[24, 40] > 100
    assert changed[4, 4] == 0
    if mode == "patch":
        assert (changed > 0).sum() == 16 * 16


def test_scales() -> None:
    maps = np.zeros((2, 10, 10), dtype=np.float32)
    maps[0, 0, 0] = 4.0
    assert clip_value(maps, 50.0) == 4.0  # the percentile is 0, so the largest code takes its place
    maps[1] = 2.0
    assert scales(maps, 100.0, "image") == [4.0, 2.0] and scales(maps, 100.0, "shared") == [4.0, 4.0]


def test_maps_of_all_alive_features(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    run(study, AliveStatistics(study.features), TopImages(study.features, 6))
    every = Selection(study.features, n_features=None, rank_by="feature", n_images=5)
    drawn = Selection(study.features, n_features=2, rank_by="max", n_images=6)
    overlays = Overlays(tmp_path / "overlays", study.images.folder, drawn, keep=every)
    with pytest.raises(ValueError, match=r"\d+ of \d+ maps .* `only` leaves out"):
        run(
            study,
            overlays,
            only=Selection(study.features, n_features=1, rank_by="max", n_images=1),
            module=FeatureMapping,
        )
    assert not (tmp_path / "overlays" / "maps.npy").exists()
    run(
        study,
        overlays,
        only=Selection(study.features, n_features=None, rank_by="feature", n_images=6),
        module=FeatureMapping,
    )
    maps, pairs = (np.load(tmp_path / "overlays" / name) for name in ("maps.npy", "maps-index.npy"))
    codes = study.sae.encode(study.tokens.tokens_batch(range(24))).detach().numpy()
    expected = codes[pairs[:, 1], :, pairs[:, 0]].reshape(-1, 4, 4)
    assert np.allclose(maps, expected, atol=1e-5)
    two = {row.feature for row in drawn.rows()}
    alive = [row for row in read_features(study.features) if row.alive]
    shown = [(row.feature, i) for row in alive for i in row.top_images[: 6 if row.feature in two else 5]]
    assert pairs.tolist() == [list(pair) for pair in shown] and len(alive) > 10
    for row in read_csv(tmp_path / "overlays" / "overlays.csv"):
        assert pairs[int(row["map"])].tolist() == [int(row["feature"]), int(row["image"])]
    opened = MapFile.open(tmp_path / "overlays")
    assert isinstance(opened.maps, np.memmap) and len(opened.of(alive[3].feature, 2).maps) == 2
    undrawn = next(row.feature for row in alive if row.feature not in two)
    select = Selection(study.features, features=(undrawn,), n_images=4)
    (row,) = sheet_rows(select, study.images.folder, tmp_path / "overlays")
    found, tops = read_overlays(tmp_path / "overlays").of(undrawn, 4)
    assert [example.image for example in row.examples] == list(found.images) == list(row.feature.top_images[:4])
    assert tops == [clip_value(found.maps, 99.0)] * 4


def test_callback_and_contact_sheet(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    run(study, AliveStatistics(study.features), TopImages(study.features, 4))
    select = Selection(study.features, n_features=3, rank_by="max", n_images=3)
    run(study, Overlays(tmp_path / "overlays", study.images.folder, select), only=select, module=FeatureMapping)
    drawn = read_overlays(tmp_path / "overlays")
    for row in select.rows():
        maps, tops = drawn.of(row.feature, 3)
        assert tops == pytest.approx(scales(maps.maps, 99.0, "shared"))
        assert maps.images == row.top_images[:3]
        codes = study.sae.encode(study.tokens.tokens(row.top_images[0])).detach()[:, row.feature]
        assert np.allclose(maps.maps[0], codes.numpy().reshape(4, 4), atol=1e-5)
        assert (tmp_path / "overlays" / f"feature-{row.feature:05d}.png").exists()
    sheet = tmp_path / "figures" / "contact_sheet.png"
    contact_sheet(sheet_rows(select, study.images.folder, tmp_path / "overlays"), sheet, title="features")
    with Image.open(sheet) as picture:
        assert picture.width > 1000
    assert [int(row["feature"]) for row in read_csv(sheet.with_suffix(".csv"))] == [r.feature for r in select.rows()]
    with pytest.raises(FileNotFoundError, match="overlays"):
        read_overlays(tmp_path / "nowhere")
