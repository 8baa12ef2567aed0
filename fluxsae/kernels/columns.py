"""Passes over whole matrices that a dense step needs between its matrix products (Triton).

Why by hand. Each of these is a few elementwise operations and a sum; PyTorch would make a pass over memory of each
operation, and a pass over codes of 8,192 tokens and 12,288 features in bf16 is 0.2 GB, 0.05 ms of an H200 each way.
Here every matrix is read once for all that is asked of it: `mask_slopes` masks the slopes, counts what fired and sums
two gradients in the pass that reads codes and slopes anyway.

Sums over tokens go through parts that a second pass adds up in a fixed order, instead of atomics: two runs give the
same bits.

Legend: N tokens, D width, F features, A some of them, R rows and C columns of any matrix.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fluxsae.kernels.fp8 import Scaled
from fluxsae.kernels.rounding import to_fp8

_ROWS = 128
_COLUMNS = 128
_WIDE = 1024
_BYTES = 64
"""Columns of bits that a program masks by, eight features each."""


def centre(
    tokens: Float[Tensor, "N D"],
    mean: Float[Tensor, "D"],
    scale: Float[Tensor, ""],
    b_dec: Float[Tensor, "D"],
    x: Float[Tensor, "N D"],
    copy: Float[Tensor, "N D"] | None = None,
    coarse: Scaled | None = None,
) -> None:
    """Write x = (tokens - mean) · scale - b_dec, to `copy` and `coarse` too."""
    block = 1024
    _centre[(triton.cdiv(tokens.numel(), block),)](
        *(tokens, mean, scale, b_dec, x, copy, *(coarse[:2] if coarse is not None else (None, None))),
        *(tokens.numel(), tokens.shape[1]),
        BLOCK=block,
    )


def positive_columns(
    pre_acts: Float[Tensor, "N F"],
    bias: Float[Tensor, "F"],
    features: Int[Tensor, "A"],
    used: Float[Tensor, "A"],
    codes: Float[Tensor, "N A"],
) -> None:
    """Write codes = ReLU(pre_acts + bias) of some features, where used is 1, and 0 where it is 0."""
    rows, block = 32, 64
    _positive_columns[(triton.cdiv(len(pre_acts), rows), triton.cdiv(len(features), block))](
        *(pre_acts, bias, features, used, codes, len(pre_acts), pre_acts.shape[1], len(features)),
        ROWS=rows,
        BLOCK=block,
    )


def squared_lengths(rows: Float[Tensor, "N D"], squares: Float[Tensor, "N"]) -> None:
    """Write each row's squared length."""
    _squared_lengths[(len(rows),)](rows, squares, rows.shape[1], BLOCK=triton.next_power_of_2(rows.shape[1]))


def weigh(rows: Float[Tensor, "N D"], weights: Float[Tensor, "N"]) -> None:
    """Multiply rows by their weights; rows of weight 1 are not even read."""
    _weigh[(len(rows),)](rows, weights, rows.shape[1], BLOCK=triton.next_power_of_2(rows.shape[1]))


def column_sums(rows: Float[Tensor, "R C"], weights: Float[Tensor, "R"] | None = None) -> Float[Tensor, "C"]:
    """Σ over rows, times their weights, in an order that is the same in every run."""
    n_rows, n_columns = rows.shape
    blocks = triton.cdiv(n_rows, _ROWS)
    parts = torch.empty(blocks, n_columns, device=rows.device)
    _column_sums[(blocks, triton.cdiv(n_columns, _COLUMNS))](
        weights, rows, parts, n_rows, n_columns, ROWS=_ROWS, COLUMNS=_COLUMNS
    )
    return parts.sum(0)


def mask_slopes(
    codes: Float[Tensor, "N F"], slopes: Float[Tensor, "N F"], penalty: Float[Tensor, ""]
) -> Float[Tensor, "4 F"]:
    """Turn slopes of codes into those of pre-activations, in place: slopes + penalty where codes > 0, else 0.

    Returns sums over tokens: of codes > 0, of the new slopes, of codes, and of codes · slopes.
    """
    n_tokens, n_features = codes.shape
    blocks = triton.cdiv(n_tokens, _ROWS)
    parts = torch.empty(blocks, 4, n_features, device=codes.device)
    _mask_slopes[(blocks, triton.cdiv(n_features, _WIDE))](
        codes, slopes, penalty, parts, n_tokens, n_features, ROWS=_ROWS, COLUMNS=_WIDE
    )
    return parts.sum(0)


def mask(active: UInt8[Tensor, "N B"], slopes: Float[Tensor, "N F"]) -> Float[Tensor, "2 F"]:
    """What `mask_slopes` does without a penalty, where `active` has the bits that `keep_largest` writes: a sixteenth of
    the codes to read. Returns the first two of its sums."""
    n_tokens, n_features = slopes.shape
    blocks = triton.cdiv(n_tokens, _ROWS)
    parts = torch.empty(blocks, 2, n_features, device=slopes.device)
    _mask[(blocks, triton.cdiv(n_features, 8 * _BYTES))](
        active, slopes, parts, n_tokens, n_features, ROWS=_ROWS, BYTES=_BYTES
    )
    return parts.sum(0)


@no_type_check
@triton.jit
def _centre(tokens, mean, scale, b_dec, x, copy, coarse, coarse_scale, n, d_in, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    d = (i % d_in).to(tl.int32)
    raw = tl.load(tokens + i, mask=inside, other=0.0).to(tl.float32)
    centred = (raw - tl.load(mean + d, mask=inside, other=0.0)) * tl.load(scale)
    value = (centred - tl.load(b_dec + d, mask=inside, other=0.0)).to(x.dtype.element_ty)
    tl.store(x + i, value, mask=inside)
    if copy is not None:
        tl.store(copy + i, value, mask=inside)
    if coarse is not None:
        tl.store(coarse + i, to_fp8(value.to(tl.float32), tl.load(coarse_scale)), mask=inside)


@no_type_check
@triton.jit
def _positive_columns(
    pre_acts, bias, features, used, codes, n_tokens, n_features, n_chosen, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    a = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    feature = tl.load(features + a, mask=a < n_chosen, other=0)
    offset = tl.load(bias + feature)
    factor = tl.load(used + a, mask=a < n_chosen, other=0.0)
    inside = (n < n_tokens)[:, None] & (a < n_chosen)[None, :]
    raw = tl.load(pre_acts + n[:, None] * n_features + feature[None, :], mask=inside, other=0.0).to(tl.float32)
    code = tl.where(factor[None, :] > 0, tl.maximum(raw + offset[None, :], 0.0), 0.0)
    tl.store(codes + n[:, None] * n_chosen + a[None, :], code.to(codes.dtype.element_ty), mask=inside)


@no_type_check
@triton.jit
def _squared_lengths(rows, squares, d_in, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    value = tl.load(rows + n.to(tl.int64) * d_in + d, mask=d < d_in, other=0.0).to(tl.float32)
    tl.store(squares + n, tl.sum(value * value, 0))


@no_type_check
@triton.jit
def _weigh(rows, weights, d_in, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    weight = tl.load(weights + n)
    if weight != 1.0:
        at = n.to(tl.int64) * d_in + tl.arange(0, BLOCK)
        inside = tl.arange(0, BLOCK) < d_in
        value = tl.load(rows + at, mask=inside, other=0.0).to(tl.float32) * weight
        tl.store(rows + at, value.to(rows.dtype.element_ty), mask=inside)


@no_type_check
@triton.jit
def _column_sums(weights, rows, parts, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    value = tl.load(rows + row.to(tl.int64)[:, None] * n_columns + column[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32)
    if weights is not None:
        value *= tl.load(weights + row, mask=row < n_rows, other=0.0)[:, None]
    total = tl.sum(value, 0)
    tl.store(parts + tl.program_id(0).to(tl.int64) * n_columns + column, total, mask=column < n_columns)


@no_type_check
@triton.jit
def _mask_slopes(codes, slopes, penalty, parts, n_tokens, n_features, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    extra = tl.load(penalty)
    STEP: tl.constexpr = 4
    fired = tl.zeros([STEP, COLUMNS], tl.float32)
    bias = tl.zeros([STEP, COLUMNS], tl.float32)
    total = tl.zeros([STEP, COLUMNS], tl.float32)
    along = tl.zeros([STEP, COLUMNS], tl.float32)
    for i in range(0, ROWS, STEP):
        n = tl.program_id(0) * ROWS + i + tl.arange(0, STEP)
        inside = (n < n_tokens)[:, None] & (f < n_features)[None, :]
        at = n.to(tl.int64)[:, None] * n_features + f[None, :]
        code = tl.load(codes + at, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(slopes + at, mask=inside, other=0.0).to(tl.float32)
        active = code > 0
        masked = tl.where(active, slope + extra, 0.0)
        tl.store(slopes + at, masked.to(slopes.dtype.element_ty), mask=inside)
        fired += active.to(tl.float32)
        bias += masked
        total += code
        along += code * slope
    at = parts + tl.program_id(0).to(tl.int64) * 4 * n_features + f
    tl.store(at, tl.sum(fired, 0), mask=f < n_features)
    tl.store(at + n_features, tl.sum(bias, 0), mask=f < n_features)
    tl.store(at + 2 * n_features, tl.sum(total, 0), mask=f < n_features)
    tl.store(at + 3 * n_features, tl.sum(along, 0), mask=f < n_features)


@no_type_check
@triton.jit
def _mask(active, slopes, parts, n_tokens, n_features, ROWS: tl.constexpr, BYTES: tl.constexpr):
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)[None, None, :]
    n_bytes = n_features // 8
    f = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    STEP: tl.constexpr = 4
    fired = tl.zeros([STEP, BYTES, 8], tl.float32)
    bias = tl.zeros([STEP, BYTES, 8], tl.float32)
    for i in range(0, ROWS, STEP):
        n = (tl.program_id(0) * ROWS + i + tl.arange(0, STEP)).to(tl.int64)
        here = (n < n_tokens)[:, None] & (byte < n_bytes)[None, :]
        bits = tl.load(active + n[:, None] * n_bytes + byte[None, :], mask=here, other=0).to(tl.int32)
        at = n[:, None, None] * n_features + f[None, :, :]
        slope = tl.load(slopes + at, mask=here[:, :, None], other=0.0)
        kept = (bits[:, :, None] >> bit) & 1
        slope = tl.where(kept > 0, slope, 0.0)
        tl.store(slopes + at, slope, mask=here[:, :, None])
        fired += kept.to(tl.float32)
        bias += slope.to(tl.float32)
    at = parts + tl.program_id(0).to(tl.int64) * 2 * n_features + f
    tl.store(at, tl.sum(fired, 0), mask=(byte < n_bytes)[:, None])
    tl.store(at + n_features, tl.sum(bias, 0), mask=(byte < n_bytes)[:, None])
