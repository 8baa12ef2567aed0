"""The gradient of a weight's rows, gathered through the feature lists, and Adam's step on them, in one pass (Triton).

Row f's gradient is a weighted sum of the tokens (or errors) that feature f fired on. Each program owns a tile of one
row: it sums, steps, and writes weight, moments and the low-precision copy, so gradients never reach memory, and the
caches that serve the gathers work while memory serves Adam.
Legend: N tokens, D width, F features, R rows of pieces, A rows of the auxiliary loss, P tiles of channels.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from fluxsae.kernels.rounding import to_fp8
from fluxsae.training.steps.fused.kernels.feature_lists import PIECE, FeatureLists

TILE = 512
"""Channels a program works on: tokens and errors of 8,192 tokens × 512 channels in bf16 are 8 MB each."""
_ROWS = 4
"""Rows in flight a program; with one warp, so that no sum crosses warps."""
_PROGRAMS = 4096
"""Programs that share the pieces out; more than a GPU runs at once."""


class AdamState(NamedTuple):
    """One weight, Adam's moments of it, and the copy that matrix products read, of weight · low_scale."""

    weight: Float[Tensor, "F D"]
    exp_avg: Float[Tensor, "F D"]
    exp_avg_sq: Float[Tensor, "F D"]
    low: Float[Tensor, "F D"]
    low_scale: Float[Tensor, ""] | None = None


class Auxiliary(NamedTuple):
    """Gradients from the auxiliary loss: feature f's is row `row_of[f]` of `gradient`; -1 says that it has none."""

    row_of: Int[Tensor, "F"]
    gradient: Float[Tensor, "A D"]


class UnitRows(NamedTuple):
    """What keeps rows at unit length that are worked on tile by tile.

    The weight's rows are read times `scale`; `along` is the gradient along each unit row, which is taken away;
    `squares` takes each tile's part of the stepped row's squared length.
    """

    scale: Float[Tensor, "F"]
    along: Float[Tensor, "F"]
    squares: Float[Tensor, "P F"]


def n_tiles(d_in: int) -> int:
    """Into how many tiles `d_in` channels fall."""
    return -(-d_in // TILE)


def sum_pieces(
    lists: FeatureLists, weights: Float[Tensor, "M"], source: Float[Tensor, "N D"], sums: Float[Tensor, "R D"]
) -> None:
    """Write the sums of every piece behind the first of each list: Σ weights · source[tokens]."""
    d_in = source.shape[1]
    block = min(TILE, triton.next_power_of_2(d_in))
    _sum_pieces[(min(len(sums) * triton.cdiv(d_in, block), _PROGRAMS),)](
        *(lists.tokens, weights, lists.counts, lists.starts, lists.pieces, lists.owners, source, sums),
        *(len(lists.counts), d_in),
        PIECE=PIECE,
        ROWS=_ROWS,
        BLOCK=block,
        num_warps=1,
    )


def update_gathered(
    state: AdamState,
    lists: FeatureLists,
    weights: Float[Tensor, "M"],
    source: Float[Tensor, "N D"],
    pieces: Float[Tensor, "R D"],
    hyper: Float[Tensor, "5"],
    betas: tuple[float, float],
    unit: UnitRows | None = None,
    aux: Auxiliary | None = None,
    factor: float = 1.0,
    others: Float[Tensor, "F D"] | None = None,
) -> None:
    """Adam's step with the gradient hyper[2] · (factor · Σ weights · source[tokens] + auxiliary rows + others).

    It goes tile by tile of channels. `hyper` is what `adam_factors` returns.
    """
    _launch(state, lists, weights, source, pieces, others, hyper, betas, unit, aux, factor, TILE, 1)


def gather(
    lists: FeatureLists,
    weights: Float[Tensor, "M"],
    source: Float[Tensor, "N D"],
    pieces: Float[Tensor, "R D"],
    factor: float,
    gradient: Float[Tensor, "F D"],
    own: slice,
) -> None:
    """Write factor · Σ weights · source[tokens] for who sends it around; rows within `own` stay as they are."""
    n_own = own.stop - own.start
    n_features, d_in = len(gradient) - n_own, gradient.shape[1]
    block = min(TILE, triton.next_power_of_2(d_in))
    _gather[(n_features * triton.cdiv(d_in, block),)](
        *(lists.tokens, weights, lists.counts, lists.starts, lists.pieces, source, pieces, gradient),
        *(n_features, d_in, factor, own.start, n_own),
        PIECE=PIECE,
        ROWS=_ROWS,
        BLOCK=block,
        num_warps=1,
    )


def update_given(
    state: AdamState,
    gradient: Float[Tensor, "F D"],
    hyper: Float[Tensor, "5"],
    betas: tuple[float, float],
    aux: Auxiliary | None = None,
    unit: bool = False,
) -> None:
    """Adam's step with the gradient hyper[2] · (gradient + auxiliary rows). With `unit`, rows of unit length stay so:
    what of the gradient is along them is taken away, and they are written at unit length."""
    tile = triton.next_power_of_2(state.weight.shape[1]) if unit else TILE
    num_warps = max(2, min(16, tile // 512))
    _launch(state, None, None, None, None, gradient, hyper, betas, None, aux, 1.0, tile, num_warps, unit)


def _launch(
    state: AdamState,
    lists: FeatureLists | None,
    weights: Tensor | None,
    source: Tensor | None,
    pieces: Tensor | None,
    gradient: Tensor | None,
    hyper: Tensor,
    betas: tuple[float, float],
    unit: UnitRows | None,
    aux: Auxiliary | None,
    factor: float,
    tile: int,
    num_warps: int,
    whole: bool = False,
) -> None:
    n_features, d_in = state.weight.shape
    block = min(tile, triton.next_power_of_2(d_in))
    tokens, counts, starts, first_piece = (
        (lists.tokens, lists.counts, lists.starts, lists.pieces) if lists is not None else (None, None, None, None)
    )
    _update[(n_features * triton.cdiv(d_in, block),)](
        *state,
        *(tokens, weights, counts, starts, first_piece, source, pieces, gradient, hyper),
        *(unit if unit is not None else (None, None, None)),
        *(aux if aux is not None else (None, None)),
        *(n_features, d_in, factor),
        *(1 - beta for beta in betas),
        GATHER=lists is not None,
        WHOLE=whole,
        AUX=aux is not None,
        PIECE=PIECE,
        ROWS=_ROWS,
        BLOCK=block,
        num_warps=num_warps,
    )


def unit_scale(squares: Float[Tensor, "P F"], scale: Float[Tensor, "F"], hyper: Float[Tensor, "5"]) -> None:
    """Write 1 / length of the stepped rows to `scale`, where a step was taken."""
    n_tiles, n_features = squares.shape
    block = 256
    _unit_scale[(triton.cdiv(n_features, block),)](squares, scale, hyper, n_features, n_tiles, BLOCK=block)


def feature_sums(lists: FeatureLists, along: Float[Tensor, "F"], bias_gradient: Float[Tensor, "F"]) -> None:
    """Write, a feature, Σ values · slopes, the decoder gradient along its row, and Σ slopes, the bias's gradient."""
    n_features = len(along)
    _feature_sums[(n_features,)](
        *(lists.values, lists.slopes, lists.counts, lists.starts, along, bias_gradient), BLOCK=128, num_warps=1
    )


@no_type_check
@triton.jit
def _unit_scale(squares, scale, hyper, n_features, n_tiles, BLOCK: tl.constexpr):
    f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.load(hyper + 3) > 0:
        square = tl.zeros([BLOCK], tl.float32)
        for tile in range(n_tiles):
            square += tl.load(squares + tile * n_features + f, mask=f < n_features, other=0.0)
        tl.store(scale + f, tl.rsqrt(tl.maximum(square, 1e-30)), mask=f < n_features)


@no_type_check
@triton.jit
def _feature_sums(values, slopes, counts, starts, along, bias_gradient, BLOCK: tl.constexpr):
    f = tl.program_id(0)
    count = tl.load(counts + f)
    start = tl.load(starts + f)
    product = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, count, BLOCK):
        m = i + tl.arange(0, BLOCK)
        slope = tl.load(slopes + start + m, mask=m < count, other=0.0)
        product += slope * tl.load(values + start + m, mask=m < count, other=0.0)
        total += slope
    tl.store(along + f, tl.sum(product, 0))
    tl.store(bias_gradient + f, tl.sum(total, 0))


@no_type_check
@triton.jit
def _sum_rows(tokens, weights, begin, end, source, d, d_in, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Σ weights · source[tokens] over list places begin ≤ m < end, for channels d."""
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(begin, end, ROWS):
        m = i + tl.arange(0, ROWS)
        token = tl.load(tokens + m, mask=m < end, other=0).to(tl.int64)
        weight = tl.load(weights + m, mask=m < end, other=0.0)
        inside = (m < end)[:, None] & (d < d_in)[None, :]
        row = tl.load(source + token[:, None] * d_in + d[None, :], mask=inside, other=0.0)
        total += tl.sum(weight[:, None] * row.to(tl.float32), 0)
    return total


@no_type_check
@triton.jit
def _sum_list(
    tokens,
    weights,
    counts,
    starts,
    first_piece,
    source,
    pieces,
    f,
    d,
    d_in,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ weights · source[tokens] over feature f's whole list, for channels d."""
    count = tl.load(counts + f)
    start = tl.load(starts + f)
    total = _sum_rows(tokens, weights, start, start + tl.minimum(count, PIECE), source, d, d_in, ROWS, BLOCK)
    if count > PIECE:
        first = tl.load(first_piece + f)
        end = first + (count - 1) // PIECE
        for i in range(first, end, ROWS):
            piece = i + tl.arange(0, ROWS)
            there = (piece < end)[:, None] & (d < d_in)[None, :]
            part = tl.load(pieces + piece.to(tl.int64)[:, None] * d_in + d[None, :], mask=there, other=0.0)
            total += tl.sum(part, 0)
    return total


@no_type_check
@triton.jit
def _gather(
    tokens,
    weights,
    counts,
    starts,
    first_piece,
    source,
    pieces,
    gradient,
    n_features,
    d_in,
    FACTOR,
    own_start,
    n_own,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    f = tl.program_id(0) % n_features
    f += tl.where(f >= own_start, n_own, 0)
    d = tl.program_id(0) // n_features * BLOCK + tl.arange(0, BLOCK)
    total = _sum_list(tokens, weights, counts, starts, first_piece, source, pieces, f, d, d_in, PIECE, ROWS, BLOCK)
    total *= FACTOR
    tl.store(gradient + f.to(tl.int64) * d_in + d, total.to(gradient.dtype.element_ty), mask=d < d_in)


@no_type_check
@triton.jit
def _sum_pieces(
    tokens,
    weights,
    counts,
    starts,
    first_piece,
    owners,
    source,
    sums,
    n_features,
    d_in,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    last = n_features - 1
    n_pieces = tl.load(first_piece + last) + tl.maximum(tl.load(counts + last) - 1, 0) // PIECE
    for i in range(tl.program_id(0), n_pieces * tl.cdiv(d_in, BLOCK), tl.num_programs(0)):
        piece = i % n_pieces  # tile by tile, so that caches hold what is gathered
        d = i // n_pieces * BLOCK + tl.arange(0, BLOCK)
        owner = tl.load(owners + piece)
        start = tl.load(starts + owner)
        begin = start + (piece - tl.load(first_piece + owner) + 1) * PIECE
        end = tl.minimum(begin + PIECE, start + tl.load(counts + owner))
        total = _sum_rows(tokens, weights, begin, end, source, d, d_in, ROWS, BLOCK)
        tl.store(sums + piece.to(tl.int64) * d_in + d, total, mask=d < d_in)


@no_type_check
@triton.jit
def _update(
    weight,
    exp_avg,
    exp_avg_sq,
    low,
    low_scale,
    tokens,
    weights,
    counts,
    starts,
    first_piece,
    source,
    pieces,
    gradient,
    hyper,
    unit_scale,
    unit_along,
    unit_squares,
    aux_row_of,
    aux_gradient,
    n_features,
    d_in,
    FACTOR,
    RATE1,
    RATE2,
    GATHER: tl.constexpr,
    WHOLE: tl.constexpr,
    AUX: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0) // n_features
    f = tl.program_id(0) % n_features
    d = tile * BLOCK + tl.arange(0, BLOCK)
    inside = d < d_in
    at = f.to(tl.int64) * d_in + d
    if tl.load(hyper + 3) > 0:
        if GATHER:
            g = _sum_list(tokens, weights, counts, starts, first_piece, source, pieces, f, d, d_in, PIECE, ROWS, BLOCK)
            g *= FACTOR
            if gradient is not None:
                g += tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        else:
            g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        if AUX:
            aux = tl.load(aux_row_of + f)
            if aux >= 0:
                g += tl.load(aux_gradient + aux.to(tl.int64) * d_in + d, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + at, mask=inside, other=0.0)  # not sooner: registers are what keeps more rows out of flight
        m = tl.load(exp_avg + at, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
        if unit_scale is not None:
            w *= tl.load(unit_scale + f)
            g -= tl.load(unit_along + f) * w
        if WHOLE:
            g -= tl.sum(g * w, 0) * w
        g *= tl.load(hyper + 2)
        m += RATE1 * (g - m)
        v += RATE2 * (g * g - v)
        w -= tl.load(hyper) * m / (tl.sqrt(v) * tl.load(hyper + 1) + tl.load(hyper + 4))
        if WHOLE:
            w *= tl.rsqrt(tl.maximum(tl.sum(tl.where(inside, w * w, 0.0), 0), 1e-30))
        tl.store(weight + at, w, mask=inside)
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
        if low_scale is not None:
            tl.store(low + at, to_fp8(w, tl.load(low_scale)), mask=inside)
        else:
            tl.store(low + at, w.to(low.dtype.element_ty), mask=inside)
        if unit_squares is not None:
            tl.store(unit_squares + tile.to(tl.int64) * n_features + f, tl.sum(tl.where(inside, w * w, 0.0), 0))
