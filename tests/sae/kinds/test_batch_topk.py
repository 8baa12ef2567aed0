"""BatchTopK: what a batch keeps, and the threshold that inference keeps by."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxsae.sae import BatchTopK
from fluxsae.sae.kinds.batch_topk import MEMORY
from tests.synthetic import randomised


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 5), st.integers(1, 9))
def test_a_batch_keeps_its_largest_and_no_more_than_k_a_token(n_features: int, k: int, seed: int, n: int) -> None:
    k = min(k, n_features)
    sae = randomised(BatchTopK(6, n_features, k), seed)
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    run, pre = sae.training_forward(x), sae.project(x).detach()
    kept = pre.flatten().sort(descending=True).values[: n * k].relu()
    assert float(run.l0) * n <= n * k + 1e-3
    assert float(run.l0) == pytest.approx(int((kept > 0).sum()) / n)
    assert run.cutoff is not None
    assert float(run.cutoff) == pytest.approx(float(kept[kept > 0].min()) if bool((kept > 0).any()) else float("inf"))


def test_ties_do_not_keep_more() -> None:
    sae = BatchTopK(6, 20, 3)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(1.0)
    assert float(sae.training_forward(torch.randn(7, 6)).l0) == 3.0


def test_difficult_tokens_get_more() -> None:
    sae = BatchTopK(6, 20, 3)
    x = torch.cat([torch.randn(10, 6), 10 * torch.randn(10, 6)])
    with torch.no_grad():
        sae.threshold.copy_(sae.training_forward(x).cutoff)
    n_codes = (sae.encode(x) > 0).sum(dim=1)
    assert int(n_codes[10:].sum()) > 3 * int(n_codes[:10].sum())


def test_inference_regards_each_token_alone() -> None:
    sae = randomised(BatchTopK(6, 20, 3))
    sae.threshold.fill_(0.5)
    x = torch.randn(9, 6)
    codes = sae.encode(x)
    assert torch.allclose(codes[4], sae.encode(x[4]), atol=1e-6)
    pre = sae.pre_acts(x)
    assert torch.equal(codes > 0, pre > 0.5) and torch.equal(codes[codes > 0], pre[pre > 0.5])


def test_the_threshold_is_a_running_mean_of_the_cutoffs_over_processes() -> None:
    sae = BatchTopK(6, 20, 3)
    runs = [sae.training_forward(torch.randn(12, 6)) for _ in range(3)]
    expected = 0.0
    for run in runs:
        assert run.cutoff is not None
        cutoff = 2 * float(run.cutoff)  # as if another process had a larger one
        expected = cutoff if expected == 0 else MEMORY * expected + (1 - MEMORY) * cutoff
        sae.remember(run, average=lambda value: 2 * value)
    assert float(sae.threshold) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cutoff", [float("inf"), float("nan")])
def test_a_pass_that_kept_nothing_or_no_number_moves_no_threshold(cutoff: float) -> None:
    sae = BatchTopK(6, 20, 3)
    sae.threshold.fill_(0.7)
    run = sae.training_forward(torch.randn(12, 6))._replace(cutoff=torch.tensor(cutoff))
    sae.remember(run, average=lambda value: value)
    assert float(sae.threshold) == pytest.approx(0.7)


def test_gradients_reach_what_was_kept_only() -> None:
    sae = BatchTopK(6, 20, 1)
    x = torch.randn(3, 6)
    run = sae.training_forward(x)
    run.recon.square().sum().backward()
    assert sae.b_enc.grad is not None
    assert torch.equal(sae.b_enc.grad != 0, run.fired)
