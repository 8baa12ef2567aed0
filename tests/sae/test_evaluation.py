"""The explained variance against a hand calculation, and whatever the batches."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxsae.sae import TopK
from fluxsae.sae.evaluation import Evaluation, channel_sums, variance_explained

CPU = torch.device("cpu")


def test_against_a_hand_calculation() -> None:
    # Channel 0: 1 and 3 about their mean 2, SST 2; errors 0.5 and 0, SSE 0.25.
    # Channel 1: 110 and 90 about 100, SST 200; errors 0 and 2, SSE 4.
    x = torch.tensor([[1.0, 110.0], [3.0, 90.0]])
    recon = torch.tensor([[1.5, 110.0], [3.0, 92.0]])
    assert float(variance_explained(channel_sums(x, recon), 2)) == pytest.approx(1 - 4.25 / 202)


def test_a_constant_offset_explains_nothing() -> None:
    # Against a scalar mean, predicting each channel's mean would explain nearly everything here.
    x = torch.tensor([[0.0, 1000.0], [2.0, 1002.0]])
    recon = x.mean(dim=0).expand(2, 2)
    assert float(variance_explained(channel_sums(x, recon), 2)) == pytest.approx(0.0, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 59), max_size=5, unique=True))
def test_it_is_exact_over_the_whole_set_however_it_is_cut(cuts: list[int]) -> None:
    torch.manual_seed(0)
    sae, x = TopK(5, 16, 2), torch.randn(60, 5)
    sae.mean.fill_(0.3)
    sae.scale.fill_(1.7)
    evaluation = Evaluation(5, 16, CPU)
    edges = [0, *sorted(cuts), 60]
    for begin, end in pairwise(edges):
        evaluation.update(sae, x[begin:end])
    metrics = evaluation.result()
    recon, codes = sae(x).detach(), sae.encode(x).detach()
    expected = 1 - float((x - recon).double().square().sum() / (x - x.mean(dim=0)).double().square().sum())
    assert metrics.fve == pytest.approx(expected, abs=1e-5)
    assert metrics.n_tokens == 60 and metrics.l0 == pytest.approx(float((codes > 0).sum() / 60))
    assert metrics.dead_fraction == pytest.approx(float((codes == 0).all(dim=0).float().mean()))
    assert torch.allclose(metrics.density, (codes > 0).float().mean(dim=0))


def test_nothing_to_evaluate() -> None:
    with pytest.raises(ValueError, match="no held-out tokens"):
        Evaluation(5, 16, CPU).result()
