"""Matrices as fp8 numbers, and their products."""

from __future__ import annotations

import pytest
import torch

from fluxsae.kernels.fp8 import Scaled, product, why_no_fp8

DEVICE = torch.device("cuda" if torch.cuda.is_available() and why_no_fp8(torch.device("cuda")) is None else "cpu")


@pytest.mark.parametrize("size", [1e-4, 1.0, 3e5])
def test_numbers_keep_three_bits_whatever_their_size(size: float) -> None:
    matrix = size * torch.randn(32, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = Scaled.of(matrix)
    assert float(torch.log2(found.scale)).is_integer() and float(found.scale * found.inverse) == 1
    error, large = (found.decoded() - matrix).abs(), matrix.abs() > matrix.abs().max() / 1024
    assert bool((error[large] <= matrix[large].abs() / 16).all())
    assert bool((error[~large] <= matrix.abs().max() / 1024 / 16).all())


def test_numbers_may_grow_and_then_stay_at_the_largest() -> None:
    matrix = torch.tensor([[1.0, -0.5]], device=DEVICE)
    found = Scaled.of(matrix)
    found.encode(8 * matrix)
    assert found.decoded().tolist() == [[8.0, -4.0]]
    found.encode(1e6 * matrix)
    largest = 448 * float(found.inverse)
    assert largest >= 16 and found.decoded().tolist() == [[largest, -largest]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_leaves_the_scale(bad: float) -> None:
    found = Scaled.of(torch.ones(4, 4, device=DEVICE))
    before = float(found.scale)
    found.fit(torch.tensor([[1e4, bad]], device=DEVICE))
    assert float(found.scale) == before


def test_products_are_those_of_the_rounded_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (Scaled.of(torch.randn(n, 64, generator=generator).to(DEVICE)) for n in (32, 48))
    bias = torch.randn(48, generator=generator).bfloat16().to(DEVICE)
    out = torch.empty(32, 48, dtype=torch.bfloat16, device=DEVICE)
    expected = left.decoded() @ right.decoded().T
    assert torch.allclose(product(left, right, out).float(), expected, rtol=1e-2, atol=1e-2)
    assert torch.allclose(product(left, right, out, bias).float(), expected + bias.float(), rtol=1e-2, atol=2e-2)
    assert torch.allclose(product(left.part(16), right, out[:16]).float(), expected[:16], rtol=1e-2, atol=1e-2)


def test_sizes_that_16_does_not_divide_are_told() -> None:
    assert why_no_fp8(torch.device("cpu"), 32, 3072) is None
    assert "not 40" in (why_no_fp8(torch.device("cpu"), 32, 40) or "")
