"""The hot operations against their plainest definitions."""

from __future__ import annotations

import pytest
import torch

from fluxsae.kernels import reference as kernels


@pytest.mark.parametrize(("n_features", "k"), [(64, 4), (128, 8), (1024, 32), (100, 7), (33, 33), (1000, 1)])
def test_largest(n_features: int, k: int) -> None:
    x = torch.randn(20, n_features, generator=torch.Generator().manual_seed(n_features))
    indices = kernels.largest(x, k)
    assert all(len(set(row)) == k for row in indices.tolist())
    assert torch.equal(x.gather(1, indices).sort(dim=1).values, x.topk(k).values.sort(dim=1).values)


def test_ties_give_k_distinct_features() -> None:
    indices = kernels.largest(torch.zeros(5, 1024), 16)
    assert all(len(set(row)) == 16 for row in indices.tolist())


def test_decode_and_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(10, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    indices = torch.stack([torch.randperm(10, generator=generator)[:3] for _ in range(6)])
    expected = torch.einsum("nk,nkd->nd", values, rows[indices])
    assert torch.allclose(kernels.decode(values, indices, rows), expected)
    assert torch.autograd.gradcheck(lambda v, r: kernels.decode(v, indices, r), (values, rows))
