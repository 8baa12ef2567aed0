"""The k largest pre-activations of each token, where positive, found without sorting (Triton).

The bits of a positive float order as integers do, so the k-th largest is the largest integer that k entries reach.
Legend: N tokens, F features, K kept, G groups of features, J groups that may hold one of the largest.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_GROUPS = 512
_PER_GROUP = 32
"""The most features of one group."""
_WIDEST = 32768
"""The widest row that `keep_largest` holds in registers."""
_CHUNK = 4096
_ROWS = 16
"""Rows that one program looks after, of which seldom any needs it."""


def select(
    pre_acts: Float[Tensor, "N F"], bias: Float[Tensor, "F"], values: Float[Tensor, "N K"], indices: Int[Tensor, "N K"]
) -> None:
    """Write the k largest of pre_acts + bias of each row, rounded as pre_acts are, and where they stand.

    Where fewer than k are positive, value 0 at index 0 fills the rest. NaN counts as larger than any number, so it is
    among the values. The k-th largest of the maxima of many groups of features is not above the k-th largest entry,
    so one pass over a row finds the few groups that can hold an entry as large, and only those are looked at again.
    """
    n_tokens, n_features = pre_acts.shape
    k = values.shape[1]
    block_k = triton.next_power_of_2(k)
    groups = max(_GROUPS, 16 * block_k, triton.next_power_of_2(triton.cdiv(n_features, _PER_GROUP)))
    groups = min(groups, triton.next_power_of_2(n_features))
    room = min(2 * block_k, groups)
    chosen = torch.empty(n_tokens, room, device=pre_acts.device, dtype=torch.int32)
    too_many = torch.empty(n_tokens, device=pre_acts.device, dtype=torch.int32)
    arguments = (pre_acts, bias, values, indices, too_many)
    bits = _bits(pre_acts)
    _select[(n_tokens,)](
        *(*arguments, chosen, n_features, k),
        BITS=bits,
        GROUPS=groups,
        PER_GROUP=triton.next_power_of_2(triton.cdiv(n_features, groups)),
        ROOM=room,
        BLOCK_K=block_k,
        num_warps=max(1, groups // 1024),
    )
    _select_again[(triton.cdiv(n_tokens, _ROWS),)](
        *(*arguments, n_tokens, n_features, k), BITS=bits, ROWS=_ROWS, CHUNK=_CHUNK // 2, num_warps=2
    )


def keep_largest(pre_acts: Float[Tensor, "N F"], codes: Float[Tensor, "N F"], k: int) -> None:
    """Write codes: the k largest of pre_acts in their places, where positive, and 0 elsewhere; may be in place."""
    n_tokens, n_features = pre_acts.shape
    bits, block = _bits(pre_acts), triton.next_power_of_2(n_features)
    if block > _WIDEST:
        _keep_wide[(n_tokens,)](pre_acts, codes, n_features, k, BITS=bits, CHUNK=_CHUNK, num_warps=8)
    elif bits == 15 and n_features % 2 == 0:
        pairs = (pre_acts.view(torch.int32), codes.view(torch.int32))
        parts = max(1, min(32, block // 64))
        _keep_pairs[(n_tokens,)](
            *(*pairs, n_features // 2, k),
            BLOCK=block // 2,
            PARTS=parts,
            num_warps=_warps(block // 2),
            maxnreg=80,  # for three rows of 16,384 at a time on a multiprocessor instead of two
        )
    else:
        _keep[(n_tokens,)](pre_acts, codes, n_features, k, BITS=bits, BLOCK=block, num_warps=_warps(block))


def _bits(pre_acts: Tensor) -> int:
    return 15 if pre_acts.dtype.itemsize == 2 else 31


def _warps(block: int) -> int:
    return max(1, min(16, block // 1024))


@no_type_check
@triton.jit
def _key(value, dtype: tl.constexpr, BITS: tl.constexpr):
    """Integers that order positive values, rounded to `dtype`, and NaN above them; 0 for all others."""
    rounded = value.to(dtype)
    bits = rounded.to(tl.int16, bitcast=True).to(tl.int32) if BITS == 15 else rounded.to(tl.int32, bitcast=True)
    NAN: tl.constexpr = (1 << BITS) - 2
    return tl.where(value != value, NAN, tl.maximum(bits, 0))


@no_type_check
@triton.jit
def _value(key, BITS: tl.constexpr):
    """The float that a key stands for."""
    return key.to(tl.int16).to(tl.bfloat16, bitcast=True) if BITS == 15 else key.to(tl.float32, bitcast=True)


@no_type_check
@triton.jit
def _largest_reached(key, k, low, high):
    """The largest integer that k of the keys reach; k reach `low`, fewer than k reach `high`."""
    low = tl.minimum(low, high)  # a constant would not do as a variable of the loop
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = tl.sum((key >= middle).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@no_type_check
@triton.jit
def _emit(key, col, row, above_before, equal_before, n_above, threshold, values, indices, k, BITS: tl.constexpr):
    """Write what is kept of a block; return how many up to its end are above the threshold, and at it."""
    above = key > threshold
    equal = (key == threshold) & (key > 0)
    run = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
    rank_equal = n_above + equal_before + (run >> 16) - 1
    slot = row * k + tl.where(above, above_before + (run & 0xFFFF) - 1, rank_equal)
    keep = above | (equal & (rank_equal < k))
    tl.store(values + slot, _value(key, BITS).to(values.dtype.element_ty), mask=keep)
    tl.store(indices + slot, col, mask=keep)
    return above_before + tl.sum(above.to(tl.int32), 0), equal_before + tl.sum(equal.to(tl.int32), 0)


@no_type_check
@triton.jit
def _select(
    pre_acts,
    bias,
    values,
    indices,
    too_many,
    chosen,
    n_features,
    k,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dtype = pre_acts.dtype.element_ty
    group = tl.arange(0, GROUPS)
    largest = tl.full([GROUPS], float("-inf"), tl.float32)
    for begin in range(0, n_features, GROUPS):
        inside = begin + group < n_features
        raw = tl.load(pre_acts + row * n_features + begin + group, mask=inside, other=float("-inf")).to(tl.float32)
        value = raw + tl.load(bias + begin + group, mask=inside, other=0.0)
        largest = tl.maximum(largest, value, propagate_nan=tl.PropagateNan.ALL)
    key = _key(largest, dtype, BITS)
    top = tl.max(key, 0)
    bound = tl.maximum(_largest_reached(key, k, 0, top + 1), 1)
    hit = key >= bound
    place = tl.cumsum(hit.to(tl.int32), 0) - 1
    n_hit = tl.sum(hit.to(tl.int32), 0)
    tl.store(chosen + row * ROOM + place, group, mask=hit & (place < ROOM))
    tl.store(too_many + row, (n_hit > ROOM).to(tl.int32))
    tl.debug_barrier()  # other lanes read what these wrote

    j = tl.arange(0, ROOM)
    first = tl.load(chosen + row * ROOM + j, mask=j < n_hit, other=n_features)
    member = tl.arange(0, PER_GROUP)
    cols = first[:, None] + GROUPS * member[None, :]  # so laid out, a lane has whole groups
    inside = cols < n_features
    raw = tl.load(pre_acts + row * n_features + cols, mask=inside, other=float("-inf")).to(tl.float32)
    key = _key(raw + tl.load(bias + cols, mask=inside, other=0.0), dtype, BITS)
    enough = tl.sum(tl.sum((key >= bound).to(tl.int32), 1), 0) >= k
    low = tl.where(enough, bound, 0)
    high = tl.where(enough, top + 1, 1)
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = tl.sum(tl.sum((key >= middle).to(tl.int32), 1), 0) >= k
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    n_above = tl.sum(tl.sum((key > low).to(tl.int32), 1), 0)
    above = 0
    equal = 0
    best, at = tl.max(key, 1, return_indices=True)
    while tl.max(best, 0) >= tl.maximum(low, 1):  # seldom more than twice: few groups hold several of the largest
        above, equal = _emit(best, GROUPS * at + first, row, above, equal, n_above, low, values, indices, k, BITS)
        key = tl.where(member[None, :] == at[:, None], 0, key)
        best, at = tl.max(key, 1, return_indices=True)
    slot = tl.arange(0, BLOCK_K)
    rest = (slot >= above + equal) & (slot < k)
    tl.store(values + row * k + slot, 0.0, mask=rest)
    tl.store(indices + row * k + slot, 0, mask=rest)


@no_type_check
@triton.jit
def _search(pre_acts, bias, row, n_features, k, HAS_BIAS: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr):
    """The k-th largest key of a row that is read once a bit, and how many are above it."""
    threshold = 0
    n_above = 0
    for i in range(BITS):
        candidate = threshold | (1 << (BITS - 1 - i))
        n = 0
        for begin in range(0, n_features, CHUNK):
            key = _row_keys(pre_acts, bias, row, begin + tl.arange(0, CHUNK), n_features, HAS_BIAS, BITS)
            n += tl.sum((key >= candidate).to(tl.int32), 0)
        threshold = tl.where(n >= k, candidate, threshold)
        n_above = tl.where(n >= k, n_above, n)
    return threshold, n_above


@no_type_check
@triton.jit
def _row_keys(pre_acts, bias, row, cols, n_features, HAS_BIAS: tl.constexpr, BITS: tl.constexpr):
    inside = cols < n_features
    value = tl.load(pre_acts + row * n_features + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + cols, mask=inside, other=0.0)
    return _key(value, pre_acts.dtype.element_ty, BITS)


@no_type_check
@triton.jit
def _select_again(
    pre_acts,
    bias,
    values,
    indices,
    too_many,
    n_tokens,
    n_features,
    k,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows with so many equal entries that the groups that may hold one of the largest did not fit their room."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = first + tl.arange(0, ROWS)
    if tl.max(tl.load(too_many + rows, mask=rows < n_tokens, other=0), 0) > 0:
        for i in range(ROWS):
            row = first + i
            if tl.load(too_many + row, mask=row < n_tokens, other=0) > 0:
                threshold, n_above = _search(pre_acts, bias, row, n_features, k, True, BITS, CHUNK)
                above = 0
                equal = 0
                for begin in range(0, n_features, CHUNK):
                    cols = begin + tl.arange(0, CHUNK)
                    key = _row_keys(pre_acts, bias, row, cols, n_features, True, BITS)
                    above, equal = _emit(key, cols, row, above, equal, n_above, threshold, values, indices, k, BITS)


@no_type_check
@triton.jit
def _keep_pairs(pre_acts, codes, n_pairs, k, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Two bf16 keys a word: with bit 15 of both halves set, one addition compares both with a candidate."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = _positive_halves(tl.load(pre_acts + row * n_pairs + i, mask=i < n_pairs, other=0))
    top = tl.max(tl.maximum(x >> 16, x & 0xFFFF), 0)
    guess = tl.maximum(top - 512, 0)  # sixteen times smaller than the largest
    n = _n_reach(x, guess)
    low, n_low = tl.where(n >= k, guess, 0), tl.where(n >= k, n, 2 * n_pairs)
    high, n_high = tl.where(n >= k, top + 1, guess), tl.where(n >= k, 0, n)
    while high - low > 1:  # between halving and the secant: seven rounds where halving takes ten
        width = high - low
        margin = tl.maximum(width // 8, 1)
        step = width * (n_low - k) // tl.maximum(n_low - n_high, 1)
        middle = low + tl.minimum(tl.maximum(step, margin), width - margin)
        n = _n_reach(x, middle)
        low, n_low = tl.where(n >= k, middle, low), tl.where(n >= k, n, n_low)
        high, n_high = tl.where(n >= k, high, middle), tl.where(n >= k, n_high, n)
    room = k - _n_reach(x, low + 1)

    # Of those that equal the threshold, the first `room` stay: whole parts of the row, then some of one part.
    PART: tl.constexpr = BLOCK // PARTS
    equal = _n_halves(_reach(x, low) ^ _reach(x, low + 1))
    of_part = tl.sum(tl.reshape(equal, [PARTS, PART]), 1)
    whole = tl.sum((tl.cumsum(of_part, 0) <= room).to(tl.int32), 0)
    room -= tl.sum(tl.where(tl.arange(0, PARTS) < whole, of_part, 0), 0)
    begin = whole * PART
    kept = x & (_reach(x, tl.where(i < begin, low, low + 1)) * 0xFFFF)
    tl.store(codes + row * n_pairs + i, kept, mask=(i < n_pairs) & ((i < begin) | (i >= begin + PART)))
    j = begin + tl.arange(0, PART)
    x = _positive_halves(tl.load(pre_acts + row * n_pairs + j, mask=j < n_pairs, other=0))
    above = _reach(x, low + 1)
    equal = _reach(x, low) ^ above
    upper = equal >> 16
    run = tl.cumsum(_n_halves(equal), 0)
    equal = ((equal & 1) & (run - upper <= room).to(tl.int32)) | ((upper & (run <= room).to(tl.int32)) << 16)
    tl.store(codes + row * n_pairs + j, x & ((above | equal) * 0xFFFF), mask=j < n_pairs)


@no_type_check
@triton.jit
def _positive_halves(pairs):
    """0 for negative halves."""
    return pairs & ((((pairs >> 15) & 0x00010001) * 0xFFFF) ^ -1)


@no_type_check
@triton.jit
def _reach(pairs, candidate):
    """1 in each half that reaches the candidate."""
    return ((pairs + (-2147450880 - candidate * 0x00010001)) >> 15) & 0x00010001  # 0x80008000


@no_type_check
@triton.jit
def _n_halves(halves):
    return (halves & 0xFFFF) + (halves >> 16)


@no_type_check
@triton.jit
def _n_reach(pairs, candidate):
    return _n_halves(tl.sum(_reach(pairs, candidate), 0))


@no_type_check
@triton.jit
def _keep(pre_acts, codes, n_features, k, BITS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    key = _row_keys(pre_acts, pre_acts, row, col, n_features, False, BITS)
    threshold = _largest_reached(key, k, 0, tl.max(key, 0) + 1)
    n_above = tl.sum((key > threshold).to(tl.int32), 0)
    equal = (key == threshold) & (key > 0)
    keep = (key > threshold) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= k - n_above))
    tl.store(codes + row * n_features + col, _value(tl.where(keep, key, 0), BITS), mask=col < n_features)


@no_type_check
@triton.jit
def _keep_wide(pre_acts, codes, n_features, k, BITS: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    threshold, n_above = _search(pre_acts, pre_acts, row, n_features, k, False, BITS, CHUNK)
    n_equal = 0
    for begin in range(0, n_features, CHUNK):
        col = begin + tl.arange(0, CHUNK)
        key = _row_keys(pre_acts, pre_acts, row, col, n_features, False, BITS)
        equal = (key == threshold) & (key > 0)
        rank = n_above + n_equal + tl.cumsum(equal.to(tl.int32), 0)
        keep = (key > threshold) | (equal & (rank <= k))
        tl.store(codes + row * n_features + col, _value(tl.where(keep, key, 0), BITS), mask=col < n_features)
        n_equal += tl.sum(equal.to(tl.int32), 0)
