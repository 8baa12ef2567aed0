"""The gradient of a weight's rows, gathered through the feature lists, and Adam's step on them, in one pass (Triton).

Why by hand. Adam in float32 reads and writes weight and two moments, 24 bytes a number; at D = 3,072, F = 12,288 that
is 0.9 GB for one weight, 0.2 ms of an H200's memory. Autograd would also write the gradient and read it again (8 bytes
more), make it by a dense product over all tokens (618 GFLOP, 0.8 ms), and normalise rows in passes of their own.

A sparse pass knows that row f's gradient is a weighted sum of the few tokens (or errors) that feature f fired on. Each
program owns a tile of one row: it sums, steps, and writes weight, moments and the low-precision copy that products
read. So gradients never reach memory, and the caches that serve the gathers work while memory serves Adam. Tiles go
channel by channel: 8,192 tokens × 512 channels in bf16 are 8 MB, which the L2 cache holds. Long lists are cut into
pieces, summed first by `sum_pieces`, so that no program waits for a feature that fires everywhere.

Rows of the decoder have unit length. A program that sees a tile only cannot know the row's length, so it takes the
gradient along the row from `UnitRows`, leaves its part of the squared length there, and the next reader multiplies by
the scale that `unit_scale` makes of these. A dense pass has its gradient in memory; there one program takes a whole row
and needs none of that (`update_given`).
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


class Gathered(NamedTuple):
    """A gradient as sums over feature lists, Σ weights · source[tokens]; `pieces` has those of long lists' later parts.

    The list of feature f is at places `starts[f]` to `starts[f] + counts[f]`, its pieces from row `first_piece[f]` on.
    """

    tokens: Int[Tensor, "M"]
    weights: Float[Tensor, "M"]
    counts: Int[Tensor, "F"]
    starts: Int[Tensor, "F"]
    first_piece: Int[Tensor, "F"]
    source: Float[Tensor, "N D"]
    pieces: Float[Tensor, "R D"]

    @classmethod
    def of(
        cls,
        lists: FeatureLists,
        weights: Float[Tensor, "M"],
        source: Float[Tensor, "N D"],
        pieces: Float[Tensor, "R D"],
    ) -> Gathered:
        return cls(lists.tokens, weights, lists.counts, lists.starts, lists.pieces, source, pieces)


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
    n_features, d_in = state.weight.shape
    block = min(TILE, triton.next_power_of_2(d_in))
    _update_gathered[(n_features * triton.cdiv(d_in, block),)](
        *(state, Gathered.of(lists, weights, source, pieces), others, hyper, unit, aux),
        *(n_features, d_in, factor, *(1 - beta for beta in betas)),
        PIECE=PIECE,
        ROWS=_ROWS,
        BLOCK=block,
        num_warps=1,
    )


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
        *(Gathered.of(lists, weights, source, pieces), gradient, n_features, d_in, factor, own.start, n_own),
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
    n_features, d_in = state.weight.shape
    tile = triton.next_power_of_2(d_in) if unit else TILE
    block = min(tile, triton.next_power_of_2(d_in))
    _update_given[(n_features * triton.cdiv(d_in, block),)](
        *(state, gradient, hyper, aux, n_features, d_in, *(1 - beta for beta in betas)),
        UNIT=unit,
        BLOCK=block,
        num_warps=max(2, min(16, tile // 512)),
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
def _sum_list(lists, f, d, d_in, PIECE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Σ weights · source[tokens] over feature f's whole list, for channels d."""
    count = tl.load(lists.counts + f)
    start = tl.load(lists.starts + f)
    end = start + tl.minimum(count, PIECE)
    total = _sum_rows(lists.tokens, lists.weights, start, end, lists.source, d, d_in, ROWS, BLOCK)
    if count > PIECE:
        first = tl.load(lists.first_piece + f)
        end = first + (count - 1) // PIECE
        for i in range(first, end, ROWS):
            piece = i + tl.arange(0, ROWS)
            there = (piece < end)[:, None] & (d < d_in)[None, :]
            part = tl.load(lists.pieces + piece.to(tl.int64)[:, None] * d_in + d[None, :], mask=there, other=0.0)
            total += tl.sum(part, 0)
    return total


@no_type_check
@triton.jit
def _gather(
    lists,
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
    total = _sum_list(lists, f, d, d_in, PIECE, ROWS, BLOCK) * FACTOR
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
def _add_auxiliary(g, aux, f, d, d_in):
    """g and, where feature f has one, its row of the auxiliary loss's gradient."""
    row = tl.load(aux.row_of + f)
    if row >= 0:
        g += tl.load(aux.gradient + row.to(tl.int64) * d_in + d, mask=d < d_in, other=0.0).to(tl.float32)
    return g


@no_type_check
@triton.jit
def _adam(state, w, g, m, v, at, inside, hyper, RATE1, RATE2):
    """The weight after Adam's step with the gradient hyper[2] · g, and its moments written."""
    g *= tl.load(hyper + 2)
    m += RATE1 * (g - m)
    v += RATE2 * (g * g - v)
    tl.store(state.exp_avg + at, m, mask=inside)
    tl.store(state.exp_avg_sq + at, v, mask=inside)
    return w - tl.load(hyper) * m / (tl.sqrt(v) * tl.load(hyper + 1) + tl.load(hyper + 4))


@no_type_check
@triton.jit
def _store(state, w, at, inside):
    """Write the weight, and the copy that products read."""
    tl.store(state.weight + at, w, mask=inside)
    if state.low_scale is not None:
        tl.store(state.low + at, to_fp8(w, tl.load(state.low_scale)), mask=inside)
    else:
        tl.store(state.low + at, w.to(state.low.dtype.element_ty), mask=inside)


@no_type_check
@triton.jit
def _update_gathered(
    state,
    lists,
    others,
    hyper,
    unit,
    aux,
    n_features,
    d_in,
    FACTOR,
    RATE1,
    RATE2,
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
        g = _sum_list(lists, f, d, d_in, PIECE, ROWS, BLOCK) * FACTOR
        if others is not None:
            g += tl.load(others + at, mask=inside, other=0.0).to(tl.float32)
        if aux is not None:
            g = _add_auxiliary(g, aux, f, d, d_in)
        # Weight and moments not sooner: registers are what keeps more rows out of flight.
        w = tl.load(state.weight + at, mask=inside, other=0.0)
        m = tl.load(state.exp_avg + at, mask=inside, other=0.0)
        v = tl.load(state.exp_avg_sq + at, mask=inside, other=0.0)
        if unit is not None:
            w *= tl.load(unit.scale + f)
            g -= tl.load(unit.along + f) * w
        w = _adam(state, w, g, m, v, at, inside, hyper, RATE1, RATE2)
        _store(state, w, at, inside)
        if unit is not None:
            square = tl.sum(tl.where(inside, w * w, 0.0), 0)
            tl.store(unit.squares + tile.to(tl.int64) * n_features + f, square)


@no_type_check
@triton.jit
def _update_given(state, gradient, hyper, aux, n_features, d_in, RATE1, RATE2, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    f = tl.program_id(0) % n_features
    d = tl.program_id(0) // n_features * BLOCK + tl.arange(0, BLOCK)
    inside = d < d_in
    at = f.to(tl.int64) * d_in + d
    if tl.load(hyper + 3) > 0:
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        if aux is not None:
            g = _add_auxiliary(g, aux, f, d, d_in)
        w = tl.load(state.weight + at, mask=inside, other=0.0)
        m = tl.load(state.exp_avg + at, mask=inside, other=0.0)
        v = tl.load(state.exp_avg_sq + at, mask=inside, other=0.0)
        if UNIT:
            g -= tl.sum(g * w, 0) * w
        w = _adam(state, w, g, m, v, at, inside, hyper, RATE1, RATE2)
        if UNIT:
            w *= tl.rsqrt(tl.maximum(tl.sum(tl.where(inside, w * w, 0.0), 0), 1e-30))
        _store(state, w, at, inside)
