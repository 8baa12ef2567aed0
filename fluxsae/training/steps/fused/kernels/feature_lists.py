"""Which tokens each feature fired on, as one list sorted by feature and token, made without sorting (Triton).

Why. A sparse pass finds, token by token, which features fired. The update needs it the other way round: feature by
feature, which tokens. Sorting 262,144 pairs takes PyTorch half a millisecond, more than any other part of the step at
k = 32, and atomics would put a list in another order in every run, and with it the rounding of sums.

Thirty-two tokens share a word a feature; a token that fires sets its bit there. Counting bits gives every pair its
place, so the order, and with it every sum over a list, is the same in every run.
Legend: N tokens, F features, K kept, W = N/32 words, P tiles of channels, M = N·K places.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

PIECE = 64
"""Entries of a feature's list that one program sums; a longer list is cut into pieces, so that none is waited for."""
_SCAN = 8192
_PAIRS = 256


class FeatureLists(NamedTuple):
    """The pairs (token, feature) with a positive value, feature by feature.

    Feature f's lie at starts[f] ≤ m < starts[f] + counts[f]. Pieces behind the first `PIECE` of a list are summed
    ahead, each in a row of its own: those of f from pieces[f] on; `owners` says whose a row is.
    """

    tokens: Int[Tensor, "M"]
    values: Float[Tensor, "M"]
    slopes: Float[Tensor, "M"]
    counts: Int[Tensor, "F"]
    starts: Int[Tensor, "F"]
    pieces: Int[Tensor, "F"]
    owners: Int[Tensor, "R"]


def most_pieces(n_tokens: int, k: int) -> int:
    """How many rows the pieces behind the first can need."""
    return n_tokens * k // PIECE


class Places(NamedTuple):
    """Where each pair's place is in the lists: bits of who fired, how many fired in earlier words, and of the lists
    what `FeatureLists` says."""

    words: Int[Tensor, "W F"]
    before: Int[Tensor, "W F"]
    counts: Int[Tensor, "F"]
    starts: Int[Tensor, "F"]
    pieces: Int[Tensor, "F"]
    owners: Int[Tensor, "R"]


def find_places(values: Float[Tensor, "N K"], indices: Int[Tensor, "N K"], n_features: int) -> Places:
    """All of the lists but what they hold."""
    n_tokens, k = values.shape
    n_words = -(-n_tokens // 32)
    words = indices.new_zeros(n_words, n_features)
    before = torch.empty_like(words)
    counts = indices.new_empty(n_features)
    _mark[(triton.cdiv(n_tokens * k, _PAIRS),)](values, indices, words, n_tokens, n_features, k, BLOCK=_PAIRS)
    features = 16
    _count[(triton.cdiv(n_features, features),)](
        words, before, counts, n_words, n_features, WORDS=triton.next_power_of_2(n_words), FEATURES=features
    )
    starts, pieces = indices.new_empty(2, n_features).unbind()
    _starts[(1,)](counts, starts, pieces, n_features, PIECE=PIECE, BLOCK=_SCAN, num_warps=16)
    owners = indices.new_empty(max(1, most_pieces(n_tokens, k)))
    _own[(triton.cdiv(n_features, features),)](
        counts, pieces, owners, n_features, PIECE=PIECE, MOST=triton.next_power_of_2(-(-n_tokens // PIECE)),
        FEATURES=features,
    )  # fmt: skip
    return Places(words, before, counts, starts, pieces, owners)


def list_by_feature(
    values: Float[Tensor, "N K"],
    indices: Int[Tensor, "N K"],
    slopes: Float[Tensor, "P N K"],
    weights: Float[Tensor, "N"],
    places: Places,
) -> FeatureLists:
    """The lists, with slopes summed over tiles and times their token's weight."""
    n_tokens, k = values.shape
    tokens = indices.new_empty(n_tokens * k)
    listed_values, listed_slopes = torch.empty(2, n_tokens * k, device=values.device).unbind()
    _place[(triton.cdiv(n_tokens * k, _PAIRS),)](
        *(values, indices, slopes, weights, places.words, places.before, places.starts),
        *(tokens, listed_values, listed_slopes, n_tokens, len(places.counts), k, len(slopes)),
        BLOCK=_PAIRS,
    )
    return FeatureLists(tokens, listed_values, listed_slopes, *places[2:])


@no_type_check
@triton.jit
def _n_bits(x):
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F


@no_type_check
@triton.jit
def _mark(values, indices, words, n_tokens, n_features, k, BLOCK: tl.constexpr):
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < n_tokens * k
    token = pair // k
    fires = inside & (tl.load(values + pair, mask=inside, other=0.0) > 0)
    feature = tl.load(indices + pair, mask=fires, other=0)
    place = (token // 32).to(tl.int64) * n_features + feature
    tl.atomic_or(words + place, tl.full([BLOCK], 1, tl.int32) << (token % 32), mask=fires, sem="relaxed")


@no_type_check
@triton.jit
def _count(words, before, counts, n_words, n_features, WORDS: tl.constexpr, FEATURES: tl.constexpr):
    w = tl.arange(0, WORDS)
    f = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    inside = (w < n_words)[:, None] & (f < n_features)[None, :]
    at = w.to(tl.int64)[:, None] * n_features + f[None, :]
    bits = _n_bits(tl.load(words + at, mask=inside, other=0))
    tl.store(before + at, tl.cumsum(bits, 0) - bits, mask=inside)
    tl.store(counts + f, tl.sum(bits, 0), mask=f < n_features)


@no_type_check
@triton.jit
def _starts(counts, starts, pieces, n_features, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    n_entries = 0
    n_pieces = 0
    for begin in range(0, n_features, BLOCK):
        f = begin + tl.arange(0, BLOCK)
        count = tl.load(counts + f, mask=f < n_features, other=0)
        extra = tl.maximum(count - 1, 0) // PIECE
        tl.store(starts + f, n_entries + tl.cumsum(count, 0) - count, mask=f < n_features)
        tl.store(pieces + f, n_pieces + tl.cumsum(extra, 0) - extra, mask=f < n_features)
        n_entries += tl.sum(count, 0)
        n_pieces += tl.sum(extra, 0)


@no_type_check
@triton.jit
def _own(counts, pieces, owners, n_features, PIECE: tl.constexpr, MOST: tl.constexpr, FEATURES: tl.constexpr):
    f = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    n = tl.maximum(tl.load(counts + f, mask=f < n_features, other=0) - 1, 0) // PIECE
    if tl.max(n, 0) > 0:
        first = tl.load(pieces + f, mask=f < n_features, other=0)
        i = tl.arange(0, MOST)
        tl.store(owners + first[:, None] + i[None, :], f[:, None] + 0 * i[None, :], mask=i[None, :] < n[:, None])


@no_type_check
@triton.jit
def _place(
    values,
    indices,
    slopes,
    weights,
    words,
    before,
    starts,
    tokens,
    listed_values,
    listed_slopes,
    n_tokens,
    n_features,
    k,
    n_tiles,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < n_tokens * k
    token = pair // k
    value = tl.load(values + pair, mask=inside, other=0.0)
    fires = inside & (value > 0)
    feature = tl.load(indices + pair, mask=fires, other=0)
    at = (token // 32).to(tl.int64) * n_features + feature
    lower = (tl.full([BLOCK], 1, tl.int32) << (token % 32)) - 1
    rank = tl.load(before + at, mask=fires, other=0) + _n_bits(tl.load(words + at, mask=fires, other=0) & lower)
    place = tl.load(starts + feature, mask=fires, other=0) + rank
    slope = tl.zeros([BLOCK], tl.float32)
    for tile in range(n_tiles):
        slope += tl.load(slopes + tile * (n_tokens * k) + pair, mask=fires, other=0.0)
    tl.store(tokens + place, token, mask=fires)
    tl.store(listed_values + place, value, mask=fires)
    tl.store(listed_slopes + place, slope * tl.load(weights + token, mask=fires, other=0.0), mask=fires)
