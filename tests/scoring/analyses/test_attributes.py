"""Attributes are counted as the prompts say them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxsae.files.json_files import read_json
from fluxsae.records.features import Feature, read_features
from fluxsae.scoring.analyses.alive import AliveStatistics
from fluxsae.scoring.analyses.attributes import Attributes, attribute_values, compare, frequencies, shared_attribute
from fluxsae.scoring.analyses.coherence import Coherence
from fluxsae.scoring.analyses.top_images import TopImages
from tests.random_clip import random_clip
from tests.scoring.study import make_study, run


def test_shared_attribute() -> None:
    fox, pair, blue = (
        attribute_values(said)
        for said in ({"object": "fox", "background": "blue"}, {"object": "owl|fox"}, {"background": "blue"})
    )
    assert shared_attribute([fox, pair, blue], {"object=fox": 0.5, "background=blue": 0.1}).label == "background=blue"
    assert shared_attribute([fox, pair], {}) == ("object=fox", 1.0)
    often = {"object=fox": 0.9, "background=blue": 0.1}
    assert shared_attribute([fox] * 4 + [pair], often) == ("background=blue", 0.8)  # shared enough, and says more
    assert shared_attribute([fox] * 3 + [pair] * 2, often) == ("object=fox", 1.0)
    assert shared_attribute([], {}) == ("", 0.0)
    assert frequencies([fox, pair])["object=owl"] == 0.5


def test_compare() -> None:
    table = [
        Feature({"feature": i, "alive": True, "coherence": i / 10, "label_share": 1.0 if i > 5 else 0.5})
        for i in range(10)
    ]
    result = compare(table, 3, 0.8, seed=0)
    assert result.coherent == [9, 8, 7] and result.coherent_sharing == 3
    assert len(result.random) == 3 and result.random_sharing == sum(i > 5 for i in result.random)


def test_callback(tmp_path: Path) -> None:
    study, clip = make_study(tmp_path), random_clip(tmp_path / "clip")
    run(
        study,
        AliveStatistics(study.features, min_images=1),
        TopImages(study.features, 4),
        Coherence(study.features, study.images.folder, clip, n_images=4, n_null=5),
        Attributes(study.features, study.folder / "prompts.jsonl", n_compare=3),
    )
    for row in read_features(study.features):
        if row.top_images:  # every prompt says kind=b
            assert (row.label, row.label_share) in {("kind=b", 1.0), ("kind=a", 1.0)} or len(row.top_images) == 1
    assert read_json(tmp_path / "attributes.json")["coherent_sharing"] == pytest.approx(3)
