"""Matrix products of fp8 numbers (e4m3), which the matrix units of an H100 take at twice the rate of bf16.

e4m3 has three bits behind the point over fifteen powers of two, so one scale for a whole matrix is enough: what is some
thousand times smaller than the largest number loses bits, and adds nothing to a product either. Numbers beyond the
largest that there is, 448, become that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
_ROOM = 16
"""How many times larger a matrix's numbers may become until it is given another scale."""
_ROWS = 4096
"""Rows that are encoded at a time, so that float32 numbers of all of them never are in memory together."""


class Scaled(NamedTuple):
    """A matrix as fp8 numbers: `values` are those of the matrix times `scale`, of which `inverse` is the inverse."""

    values: Float[Tensor, "N D"]
    scale: Float[Tensor, ""]
    inverse: Float[Tensor, ""]

    @classmethod
    def empty(cls, n_rows: int, width: int, device: torch.device) -> Scaled:
        """Of arbitrary numbers, with scale 1."""
        values = torch.empty(n_rows, width, dtype=FP8, device=device)
        return cls(values, torch.ones((), device=device), torch.ones((), device=device))

    @classmethod
    def of(cls, matrix: Float[Tensor, "N D"]) -> Scaled:
        """The numbers that stand for those of a matrix, by the scale that fits them."""
        found = cls.empty(len(matrix), matrix.shape[1], matrix.device)
        found.fit(matrix)
        found.encode(matrix)
        return found

    def part(self, n_rows: int) -> Scaled:
        """The first rows, in the same memory."""
        return self._replace(values=self.values[:n_rows])

    def fit(self, matrix: Float[Tensor, "M D"]) -> None:
        """Take the power of two as the scale that leaves the matrix room to grow, without waiting for a device.

        Where one of its numbers is not finite the scale stays as it is.
        """
        largest = torch.maximum(matrix.amax(), -matrix.amin()).float().clamp_min(1e-20)
        scale = torch.exp2(torch.floor(torch.log2(LARGEST / _ROOM / largest)))
        self.scale.copy_(torch.where(largest.isfinite(), scale, self.scale))
        self.inverse.copy_(1 / self.scale)

    def encode(self, matrix: Float[Tensor, "N D"]) -> None:
        """Take the numbers of a matrix, by the scale that there is."""
        for values, rows in zip(self.values.split(_ROWS), matrix.split(_ROWS), strict=True):
            values.copy_((rows * self.scale).clamp_(-LARGEST, LARGEST))

    def decoded(self) -> Float[Tensor, "N D"]:
        """The numbers that products are of, in float32."""
        return self.values.float() * self.inverse


def product(
    left: Scaled, right: Scaled, out: Float[Tensor, "N F"], bias: Float[Tensor, "F"] | None = None
) -> Float[Tensor, "N F"]:
    """Write left @ rightᵀ + bias; on a GPU, what is written with a bias is bf16."""
    return torch._scaled_mm(
        left.values,
        right.values.T,
        left.inverse,
        right.inverse,
        bias=bias,
        out_dtype=out.dtype,
        use_fast_accum=True,
        out=out,
    )


def straight_through(
    left: Float[Tensor, "N D"],
    right: Float[Tensor, "F D"],
    left_fp8: Float[Tensor, "N D"],
    right_fp8: Float[Tensor, "F D"],
) -> Float[Tensor, "N F"]:
    """The product of rounded numbers, decoded, for autograd to differentiate as a fused step does.

    The gradient of `right` is by `left` as it is, that of `left` by `right` as it was rounded.
    """
    passed = left.detach() @ right.T + left @ right_fp8.T
    return (left_fp8 @ right_fp8.T - passed).detach() + passed


def why_no_fp8(device: torch.device, *sizes: int) -> str | None:
    """What keeps matrices of these sizes from being multiplied so on a device, in words; None when nothing does."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} multiplies no fp8 numbers"
    uneven = [size for size in sizes if size % 16]
    return f"fp8 wants sizes that 16 divides, not {uneven[0]}" if uneven else None
