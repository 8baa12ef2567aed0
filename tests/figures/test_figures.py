"""Every figure writes a PNG and its numbers; what they compute has its known values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from fluxsae.figures.compare_sites import SiteFeatures, both_sites, compare_sites, correlation, match
from fluxsae.figures.decoder import decoder
from fluxsae.figures.density import density
from fluxsae.figures.matrix import order_by_likeness
from fluxsae.figures.training_curves import Curve, read_run, spread, training_curves
from fluxsae.files.tables import read_csv
from fluxsae.records.features import Feature
from fluxsae.scoring.scores import Scores
from tests.synthetic import capture_spec

RNG = np.random.default_rng(0)


def features(n: int) -> list[Feature]:
    return [Feature({"feature": i, "alive": True, "label": "object=fox" if i % 2 else ""}) for i in range(n)]


def is_picture(path: Path) -> bool:
    with Image.open(path) as picture:
        return picture.width > 400


def test_training_curves(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "fit" / "version_0")) as board:
        for step in range(4):
            board.add_scalar("train/loss", 1 / (step + 1), step)
            board.add_scalar("val/fve", 0.9, step)
            board.add_scalar("epoch", 0, step)
    run = read_run(tmp_path / "fit")
    assert run["train/loss"].values == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4]) and set(run) == {"train/loss", "val/fve"}
    path = tmp_path / "curves.png"
    training_curves({"TopK": run, "L1": run}, path)
    assert is_picture(path) and len(read_csv(path.with_suffix(".csv"))) == 16
    with pytest.raises(FileNotFoundError, match="event files"):
        read_run(tmp_path / "nowhere")


def test_a_fit_that_ended_early_does_not_hide_the_one_before(tmp_path: Path) -> None:
    for version, tag in enumerate(("train/loss", "hp_metric")):
        with SummaryWriter(str(tmp_path / f"version_{version}")) as board:
            board.add_scalar(tag, 1.0, 1)
    assert set(read_run(tmp_path)) == {"train/loss"}


@pytest.mark.parametrize("values", [[-4.0, -3.0], [0.75, 0.83], [1e6, 2e6]])
def test_last_values_stand_within_their_panel(tmp_path: Path, values: list[float]) -> None:
    """Outside of it, the layout would have no room for the panel itself, and matplotlib warn of it."""
    run = {tag: Curve([10, 1000], values) for tag in ("val/fve", "val/l0")}
    training_curves({"TopK": run, "L1": {"val/fve": Curve([10], [0.5])}}, tmp_path / "curves.png")


def test_spread() -> None:
    assert spread([0.5, 0.1, 0.52], gap=0.1) == pytest.approx([0.1, 0.5, 0.6])


@pytest.mark.parametrize("frequency", [[0.0, 0.1, 0.5, 1.0], [0.0, 0.0], [1.0]])
def test_density(tmp_path: Path, frequency: list[float]) -> None:
    path = tmp_path / "density.png"
    density(np.array(frequency), path)
    counts = [int(row["features"]) for row in read_csv(path.with_suffix(".csv"))]
    assert is_picture(path) and sum(counts) == len(frequency) and counts[0] == frequency.count(0.0)


def test_decoder(tmp_path: Path) -> None:
    weights = RNG.standard_normal((30, 8)).astype(np.float32)
    weights[3] = 2 * weights[5]
    path = tmp_path / "decoder.png"
    decoder(weights, features(6), path)
    table = {row["feature"]: row for row in read_csv(path.with_suffix(".csv"))}
    assert is_picture(path) and float(table["3"]["5"]) == pytest.approx(1)
    assert len(read_csv(tmp_path / "decoder_norms.csv")) == 30


def test_compare_sites(tmp_path: Path) -> None:
    left = RNG.random((50, 4))
    right = np.column_stack([left[:, 2], -left[:, 0], np.ones(50), left[:, 0] + 0.1 * RNG.random(50)])
    values = correlation(left, right)
    assert values[2, 0] == pytest.approx(1) and values[0, 1] == pytest.approx(-1) and not values[:, 2].any()
    assert [(pair.left, pair.right) for pair in match(values)[:2]] == [(2, 0), (0, 3)]
    path = tmp_path / "compare.png"
    compare_sites(SiteFeatures("a", features(4), left), SiteFeatures("b", features(4), right), path)
    assert is_picture(path) and len(read_csv(tmp_path / "compare_pairs.csv")) == 4


def test_two_saes_of_one_site_are_told_apart_by_their_folders() -> None:
    matrix = RNG.random((5, 4))
    one, other = (Scores(Path(folder), matrix, [], capture_spec()) for folder in ("scores", "scores-l1"))
    left, right = both_sites(one, other, features(4), features(2))
    assert (left.name, right.name) == tuple(f"transformer_blocks.1.ff, step 2\n{f}" for f in ("scores", "scores-l1"))
    assert np.array_equal(left.scores, matrix) and np.array_equal(right.scores, matrix[:, :2])
    later = Scores(Path("later"), matrix, [], capture_spec(step=3))
    assert [site.name[-6:] for site in both_sites(one, later, features(4), features(4))] == ["step 2", "step 3"]
    with pytest.raises(ValueError, match="scores and other score different images"):
        both_sites(one, Scores(Path("other"), matrix, [], capture_spec(size=128)), features(4), features(4))


def test_order_puts_like_beside_like() -> None:
    order = order_by_likeness(np.array([[1.0, 0.1, 0.9], [0.1, 1.0, 0.2], [0.9, 0.2, 1.0]]))
    assert order in ([0, 2, 1], [2, 0, 1])
