"""The autoencoders' maths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fluxsae.records.statistics import Statistics
from fluxsae.sae import L1, SAE, BatchTopK, JumpReLU, TopK
from tests.synthetic import capture_spec, randomised

KINDS = [L1(8, 20), TopK(8, 20, 3), BatchTopK(8, 20, 3), JumpReLU(8, 20), TopK(8, 20, 3, groups=[5, 12, 20])]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 80), st.integers(1, 40), st.integers(0, 5), st.integers(1, 4))
def test_topk_keeps_the_k_largest_and_no_more(n_features: int, k: int, seed: int, n_tokens: int) -> None:
    k = min(k, n_features)
    sae = randomised(TopK(6, n_features, k), seed)
    pre = torch.randn(n_tokens, n_features, generator=torch.Generator().manual_seed(seed))
    codes = sae.activate(pre)
    assert int((codes > 0).sum(dim=1).max()) <= k and bool((codes >= 0).all())
    expected = pre.sort(dim=1, descending=True).values[:, :k].relu()
    assert torch.equal(codes.sort(dim=1, descending=True).values[:, :k], expected)
    assert bool(((codes == pre) | (codes == 0)).all())


@pytest.mark.parametrize("sae", KINDS)
def test_any_leading_shape_and_dtype(sae: SAE) -> None:
    x = torch.randn(2, 3, 8)
    randomised(sae)
    assert sae.encode(x).shape == (2, 3, 20) and sae(x).shape == (2, 3, 8)
    assert torch.allclose(sae.encode(x)[1, 2], sae.encode(x[1, 2][None])[0], atol=1e-6)
    assert sae.encode(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("sae", [L1(8, 20), TopK(8, 20, 3), TopK(8, 256, 4), TopK(8, 20, 3, groups=[4, 20])])
def test_a_training_pass_reconstructs_as_forward_does(sae: SAE) -> None:
    x = torch.randn(50, 8)
    randomised(sae)
    run = sae.training_forward(sae.normalise(x))
    codes = sae.encode(x)
    assert torch.allclose(run.recon / sae.scale + sae.mean, sae(x), atol=1e-5)
    assert torch.equal(run.fired, (codes > 0).any(dim=0))
    assert float(run.l0) == pytest.approx(float((codes > 0).float().sum(dim=1).mean()))
    assert float(run.penalty.detach()) == pytest.approx(
        float(codes.detach().sum(dim=1).mean()) if isinstance(sae, L1) else 0.0
    )


def test_the_sparse_pass_has_the_gradients_of_the_dense_one() -> None:
    sae = randomised(TopK(8, 256, 4))
    x = torch.randn(50, 8)

    def gradients(recon: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((recon - x).square().sum(), list(sae.parameters())))

    sparse = gradients(sae.training_forward(x).recon)
    dense = gradients(SAE.training_forward(sae, x).recon)
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-4) for a, b in zip(sparse, dense, strict=True))


@pytest.mark.parametrize("sae", KINDS)
def test_folding_changes_nothing_but_where_the_numbers_are(sae: SAE) -> None:
    x = 3 + 2 * torch.randn(40, 8)
    randomised(sae)
    folded = sae.fold()
    assert torch.equal(folded.mean, torch.zeros(8)) and float(folded.scale) == 1.0
    assert torch.allclose(folded.encode(x), sae.encode(x), atol=1e-4)
    assert torch.allclose(folded(x), sae(x), atol=1e-4)
    assert torch.allclose(folded.directions, sae.directions, atol=1e-6)


def test_the_gradient_loses_what_is_parallel_to_the_rows() -> None:
    sae = randomised(TopK(8, 20, 3))
    sae.training_forward(torch.randn(30, 8)).recon.square().sum().backward()
    gradient = sae.W_dec.grad
    assert gradient is not None and float((gradient * sae.W_dec.detach()).sum(dim=1).abs().max()) > 1e-3
    sae.remove_parallel_gradient()
    assert float((gradient * sae.W_dec.detach()).sum(dim=1).abs().max()) < 1e-4


def test_rows_come_back_to_unit_length() -> None:
    sae = TopK(8, 20, 3)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(20, 1) + 0.1)
    sae.normalise_rows()
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(20))


def test_statistics_normalise() -> None:
    sae = L1(4, 8)
    sae.set_statistics(Statistics(9, torch.arange(4, dtype=torch.float64), 0.5, 7.0), capture_spec())
    assert sae.normalise(torch.full((1, 4), 4.0)).tolist() == [[2.0, 1.5, 1.0, 0.5]]
    assert sae.mean_norm == 7.0 and sae.spec == capture_spec()
    with pytest.raises(ValueError, match="3 wide but the SAE's d_in is 4; set d_in to 3"):
        sae.set_statistics(Statistics(9, torch.zeros(3, dtype=torch.float64), 1.0, 1.0), None)


@pytest.mark.parametrize("k", [0, 21])
def test_an_impossible_k_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}, expected 1 to n_features = 20"):
        TopK(8, 20, k)


@pytest.mark.parametrize("groups", [[], [20, 20], [5, 19], [0, 20], [12, 5, 20], [20, 21]])
def test_impossible_groups_are_refused(groups: list[int]) -> None:
    with pytest.raises(ValueError, match="expected sizes that ascend from at least 1 to n_features = 20"):
        L1(8, 20, groups=groups)


@pytest.mark.parametrize("kind", [L1, lambda d, f, **more: TopK(d, f, 4, **more), JumpReLU])
def test_a_prefix_rebuilds_what_its_features_decode_to(kind: Callable[..., SAE]) -> None:
    sae = randomised(kind(8, 20, groups=[3, 11, 20]))
    x = sae.normalise(torch.randn(30, 8))
    run, codes = sae.training_forward(x), sae.activate(sae.project(x))
    assert len(run.partial) == 2
    for size, recon in zip((3, 11, 20), (*run.partial, run.recon), strict=True):
        assert torch.allclose(recon, codes[:, :size] @ sae.W_dec[:size] + sae.b_dec, atol=1e-5)


def test_a_seed_decides_the_initial_weights_and_touches_no_other_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (TopK(8, 20, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.W_dec, same.W_dec) and not torch.equal(one.W_dec, other.W_dec)
