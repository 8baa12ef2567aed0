"""What the first edition left on disk opens: SAEs of every kind, a capture, scores, the features table, overlays.

The files in `fixtures/first_edition` were written by version 0.1.0 and must not be written anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fluxsae

FIXTURES = Path(__file__).parent / "fixtures" / "first_edition"
KINDS = {"l1": "L1", "topk": "TopK", "batch_topk": "BatchTopK", "jumprelu": "JumpReLU", "matryoshka": "TopK"}


@pytest.mark.parametrize("name", KINDS)
def test_an_sae_computes_what_it_did(name: str) -> None:
    sae = fluxsae.load_sae(FIXTURES / "saes" / name)
    expected = np.load(FIXTURES / "saes" / "expected.npz")
    tokens = torch.from_numpy(expected["tokens"])
    assert type(sae).__name__ == KINDS[name] and sae.mean_norm == 3.25 and sae.spec is not None
    assert np.allclose(sae.encode(tokens), expected[f"{name}_codes"], atol=1e-6)
    assert np.allclose(sae(tokens), expected[f"{name}_recon"], atol=1e-5)


def test_a_state_dict_checkpoint_opens() -> None:
    assert fluxsae.load_sae(FIXTURES / "saes" / "state_dict.pt").spec is None


@pytest.mark.parametrize("site", ["transformer_blocks.1.ff", "single_transformer_blocks.0@text"])
def test_a_capture_opens_and_is_whole(site: str) -> None:
    folder = FIXTURES / "capture" / site / "step-01"
    shards = fluxsae.ShardSet.open(folder)
    assert len(shards) == 5 and shards.tokens(4).shape == (16, 32)
    assert fluxsae.verify(folder) == []
    assert fluxsae.ShardSet.open(FIXTURES / "capture" / "images").image(0).size == (64, 64)


def test_scores_and_the_features_table_open() -> None:
    scores = fluxsae.Scores.open(FIXTURES / "scores")
    assert scores.matrix.shape == (5, 24)
    table = fluxsae.read_features(FIXTURES / "features.csv")
    assert len(table) == 24 and any(row.alive and row.top_images for row in table)
    chosen = fluxsae.Selection(FIXTURES / "features.csv", n_features=3, rank_by="max").rows()
    assert [row.max for row in chosen] == sorted((row.max for row in chosen), reverse=True)
    best = chosen[0]
    assert best.max == pytest.approx(float(scores.matrix[:, best.feature].max()))
