"""Contact sheets of features at the edges of the scale."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fluxsae.figures.contact_sheet import Example, SheetRow, contact_sheet
from fluxsae.records import Feature, read_features

TABLE = Path(__file__).parents[1] / "fixtures" / "first_edition" / "features.csv"


@pytest.mark.parametrize("values", [(-0.1, 0.5), (0.0, 0.4), (-0.2, -0.2), (0.3, 0.3)])
def test_the_least_coherent_feature_has_a_bar_of_no_width(tmp_path: Path, values: tuple[float, float]) -> None:
    picture = Image.new("RGB", (32, 32))
    feature = read_features(TABLE)[0]
    rows = [
        SheetRow(
            Feature({**feature.columns, "coherence": value, "coherence_null": 0.1}), [Example(0, picture, picture)]
        )
        for value in values
    ]
    contact_sheet(rows, tmp_path / "sheet.png", title="features")
    assert (tmp_path / "sheet.png").exists() and (tmp_path / "sheet.csv").exists()
