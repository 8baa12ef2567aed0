"""The weights of tokens: 1 for ordinary ones, and a bound on how hard an outlier pulls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fluxsae.sae import TopK
from fluxsae.sae.objective import squared_errors, token_weights


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.floats(0.1, 100))
def test_no_weighted_error_is_longer_than_allowed(lengths: list[float], clip: float) -> None:
    errors = torch.tensor(lengths)
    weights = token_weights(errors.square(), clip)
    assert bool(((weights >= 0) & (weights <= 1)).all())
    limit = clip * float(errors.mean())
    assert float((weights * errors).max()) <= limit * 1.001 + 1e-6
    assert bool((weights[errors < 0.999 * limit] == 1).all())


def gradient(x: Tensor, clip: float) -> Tensor:
    """Of the decoder, by the weighted errors of fixed weights."""
    sae = TopK(8, 40, 4, seed=0)
    squared = squared_errors(x, sae.training_forward(x))
    (token_weights(squared, clip) * squared).mean().backward()
    assert sae.W_dec.grad is not None
    return sae.W_dec.grad


def tokens() -> Tensor:
    return torch.randn(200, 8, generator=torch.Generator().manual_seed(1))


def test_ordinary_batches_are_untouched_to_the_bit() -> None:
    assert torch.equal(gradient(tokens(), clip=10.0), gradient(tokens(), clip=0.0))


def test_an_outlier_pulls_no_harder_than_clip_mean_errors() -> None:
    x = tokens()
    ordinary = gradient(x, clip=10.0)
    code = float(TopK(8, 40, 4, seed=0).encode(x[:1]).detach().norm())
    x[0] *= 1000
    lengths = squared_errors(x, TopK(8, 40, 4, seed=0).training_forward(x)).detach().sqrt()
    mean = float(lengths.mean())
    assert float(lengths[0]) > 100 * mean
    pull = float((gradient(x, clip=10.0) - ordinary).norm())
    # 2/N · s·‖e‖ · ‖z‖: the error is cut to 10 means, the code, 1000 times as large, is not.
    bound = 2 / len(x) * 10 * mean * 1000 * code + float(ordinary.norm())
    assert pull < bound < 0.2 * float((gradient(x, clip=0.0) - ordinary).norm())


def test_the_mean_is_over_all_processes() -> None:
    squared = torch.tensor([1.0, 1.0, 1.0, 1600.0])
    alone = token_weights(squared, 2.0)
    beside = token_weights(squared, 2.0, total=lambda sums: sums + torch.tensor([4 * 99.25, 4.0]))
    assert alone.tolist() == pytest.approx([1, 1, 1, 2 * 10.75 / 40])
    assert beside.tolist() == pytest.approx([1, 1, 1, 1])


def test_what_is_no_number_stays_none() -> None:
    assert not bool(token_weights(torch.tensor([1.0, float("nan")]), 10.0).isfinite().all())
    squared = torch.tensor([1.0, float("inf")])
    assert not bool((token_weights(squared, 10.0) * squared).sum().isfinite())


def test_without_errors_nothing_is_divided_by_zero() -> None:
    assert bool(token_weights(torch.zeros(3), 10.0).isfinite().all())
