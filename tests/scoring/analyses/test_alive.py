"""Streamed statistics equal those over the whole matrix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fluxsae.records.features import read_features
from fluxsae.scoring.analyses.alive import Activity, AliveStatistics, table_columns
from tests.scoring.study import all_scores, make_study, run


def test_hand_made() -> None:
    scores = torch.tensor([[0.0, 2.0, 0.1], [0.0, 4.0, 0.0], [0.0, 0.0, 0.2], [0.0, 6.0, 0.0]])
    activity = Activity.of(scores[:1], 0.15).merge(Activity.of(scores[1:3], 0.15)).merge(Activity.of(scores[3:], 0.15))
    columns = table_columns(activity, min_images=2, rare=0.3, common=0.5)
    assert columns["alive"] == [False, True, False] and columns["n_images"] == [0, 3, 1]
    assert columns["frequency"] == [0.0, 0.75, 0.25] and columns["class"] == ["dead", "common", "dead"]
    assert columns["mean_active"][:2] == [None, 4.0] and columns["std_active"][1] == pytest.approx((8 / 3) ** 0.5)
    assert columns["max"] == pytest.approx([0.0, 6.0, 0.2])


@pytest.mark.parametrize("size", [1, 7, 100])
def test_any_batches_give_the_same(size: int) -> None:
    scores = torch.rand(100, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.5, 0.1, 0.0, 100.0])
    total = Activity.none(5)
    for batch in scores.split(size):
        total = total.merge(Activity.of(batch, 0.05))
    active = scores[:, 4][scores[:, 4] > 0.05].double()
    assert total.std[4].item() == pytest.approx(active.std(unbiased=False).item())
    assert torch.equal(total.frequency, (scores > 0.05).double().mean(dim=0))


def test_callback(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    run(study, AliveStatistics(study.features, epsilon=0.01, min_images=3))
    scores, codes = all_scores(study), study.sae.encode(study.tokens.tokens_batch(range(24))).detach()
    for row in read_features(study.features):
        active = scores[:, row.feature] > 0.01
        assert row.token_frequency == pytest.approx((codes[..., row.feature] > 0).double().mean().item())
        assert row.n_images == int(active.sum()) and row.alive == (row.n_images >= 3)
        assert row.max == pytest.approx(scores[:, row.feature].max().item(), abs=1e-4)
