"""Coherence has its known values on hand-made embeddings, and the null keeps the constraint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fluxsae.records.features import read_features
from fluxsae.scoring.analyses.coherence import Coherence, coherence, random_sets, share_out, table_columns
from fluxsae.scoring.clip import load_clip
from fluxsae.shards.read import ShardSet
from tests.random_clip import random_clip
from tests.scoring.study import make_study, run


def test_hand_made() -> None:
    embeddings = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0.6, 0.8, 0]])
    sets = torch.tensor([[0, 2], [0, 1], [0, 3], [1, 3]])
    assert torch.allclose(coherence(embeddings, sets), torch.tensor([1.0, 0.0, 0.6, 0.8]), atol=1e-6)
    whole = coherence(embeddings, torch.tensor([[0, 1, 2, 3]]))
    assert whole.item() == pytest.approx((0 + 1 + 0.6 + 0 + 0.8 + 0.6) / 6)


def test_random_sets_keep_the_constraint() -> None:
    sets = random_sets(30, lambda image: image // 3, 5, 50, unique_prompts=True, seed=0)
    assert all(len({image // 3 for image in one}) == 5 for one in sets)
    assert {image for one in sets for image in one} == set(range(30))
    with pytest.raises(ValueError, match="11 images needs as many different prompts but there are 10"):
        random_sets(30, lambda image: image // 3, 11, 1, unique_prompts=True, seed=0)


def test_share_out() -> None:
    assert share_out([[1, 2, 3], [2, 1, 4], [4]], [1, 0, 2], 2) == [[3], [2, 1], [4]]


def test_ranking() -> None:
    columns = table_columns({0: 0.5, 2: 0.9}, 0.3, 3)
    assert columns["coherence_rank"] == [2, None, 1] and columns["coherence_null"] == [0.3, None, 0.3]


def test_each_image_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, clip = make_study(tmp_path), random_clip(tmp_path / "clip")
    loaded: list[int] = []
    load = ShardSet.image
    monkeypatch.setattr(ShardSet, "image", lambda self, image: loaded.append(image) or load(self, image))
    run(study, Coherence(study.features, study.images.folder, clip, n_images=4, n_null=5, unique_globally=True))
    assert loaded and len(loaded) == len(set(loaded))
    rows = read_features(study.features)
    shown = [image for row in rows for image in row.top_images]
    assert len(shown) == len(set(shown))
    assert any(row.coherence is not None and -1 <= row.coherence <= 1.0001 for row in rows)


@pytest.mark.parametrize("name", ["ViT-B-33/openai", "tiny-clip", "local-dir:/nowhere"])
def test_a_wrong_clip_is_one_sentence(name: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="CLIP"):
        load_clip(name)
