"""The k largest pre-activations of each token, where positive, found without sorting (Triton).

Why by hand. torch.topk sorts: of 8,192 rows of 12,288 entries it takes several times as long as the product that made
them. Nobody needs the order, only which entries are kept. So the k-th largest entry is found by bisection: the bits of
a positive float order as integers do, and the k-th largest is the largest integer that k entries reach. A bisection is
15 counts over a row of bf16 and 31 over one of float32, all in registers.

`select` wants few entries (k up to 128) and their places. One pass over memory takes the maximum of each of many groups
of features; only groups that can hold a large entry are read again. Rows with so many equal entries that these groups
are many go to a second kernel, by a list, so that they do not hold up the others. `keep_largest` wants a dense row with
zeros, for any k. It holds a whole row in registers, two bf16 numbers in a word, and also leaves a bit a code: later
passes then read a sixteenth of the bytes to know which codes are above 0.

Memory is read once and written once: 0.2 GB each way at these sizes, 0.1 ms of an H200.
Legend: N tokens, F features, K kept, G groups of features, J groups that may hold one of the largest.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, UInt8
from torch import Tensor

_GROUPS = 512
_PER_GROUP = 32
"""The most features of one group."""
_WIDEST = 32768
"""The widest row that is held in registers."""
_CHUNK = 4096
_AGAIN = 512
"""Programs that share out the rows that are looked at again."""


def select(
    pre_acts: Float[Tensor, "N F"], bias: Float[Tensor, "F"], values: Float[Tensor, "N K"], indices: Int[Tensor, "N K"]
) -> None:
    """Write the k largest of pre_acts + bias of each row, rounded as pre_acts are, and where they stand.

    Where fewer than k are positive, value 0 at index 0 fills the rest. NaN counts as larger than any number, so it is
    among the values. The k-th largest of the maxima of many groups of features is not above the k-th largest entry,
    so one pass over a row finds the few groups that can hold an entry as large, and only those are looked at again.
    Rows with so many equal entries that these groups are many are searched whole.
    """
    n_tokens, n_features = pre_acts.shape
    k = values.shape[1]
    block_k = triton.next_power_of_2(k)
    groups = max(_GROUPS, 16 * block_k, triton.next_power_of_2(triton.cdiv(n_features, _PER_GROUP)))
    groups = min(groups, triton.next_power_of_2(n_features))
    room = min(2 * block_k, groups)
    chosen = torch.empty(n_tokens, room, device=pre_acts.device, dtype=torch.int32)
    again = torch.empty(1 + n_tokens, device=pre_acts.device, dtype=torch.int32)
    again[:1].zero_()
    arguments = (pre_acts, bias, values, indices, again)
    bits, block = _bits(pre_acts), triton.next_power_of_2(n_features)
    _select[(n_tokens,)](
        *(*arguments, chosen, n_features, k),
        BITS=bits,
        GROUPS=groups,
        PER_GROUP=triton.next_power_of_2(triton.cdiv(n_features, groups)),
        ROOM=room,
        BLOCK_K=block_k,
        num_warps=max(1, groups // 1024),
    )
    wide = block > _WIDEST
    _select_again[(min(n_tokens, _AGAIN),)](
        *(*arguments, n_features, k), BITS=bits, BLOCK=_CHUNK if wide else block, WIDE=wide, num_warps=8
    )


def keep_largest(
    pre_acts: Float[Tensor, "N F"], codes: Float[Tensor, "N F"], k: int, active: UInt8[Tensor, "N B"] | None = None
) -> None:
    """Write codes: the k largest of pre_acts in their places, where positive, and 0 elsewhere; may be in place.

    Where `packs` says so, `active` takes a bit a feature, the lowest first: 1 where its code is above 0.
    """
    n_tokens, n_features = pre_acts.shape
    bits, block = _bits(pre_acts), triton.next_power_of_2(n_features)
    if block > _WIDEST:
        _keep_wide[(n_tokens,)](pre_acts, codes, n_features, k, BITS=bits, CHUNK=_CHUNK, num_warps=8)
    elif packs(n_features, pre_acts.dtype):
        pairs = (pre_acts.view(torch.int32), codes.view(torch.int32))
        block, rest = _two_blocks(n_features // 2)
        _keep_pairs[(n_tokens,)](
            *(*pairs, active, n_features // 2, k),
            BLOCK=block,
            REST=rest,
            PART=_part(block),
            num_warps=_warps(block),
            maxnreg=80,  # for three rows of 16,384 at a time on a multiprocessor instead of two
        )
    else:
        _keep[(n_tokens,)](pre_acts, codes, n_features, k, BITS=bits, BLOCK=block, num_warps=_warps(block))


def packs(n_features: int, dtype: torch.dtype) -> bool:
    """Whether `keep_largest` can say in bits which codes of such rows are above 0."""
    return dtype.itemsize == 2 and n_features % 8 == 0 and n_features <= _WIDEST


def _two_blocks(n: int) -> tuple[int, int]:
    """The powers of two that hold n between them with the least left over; the second is 0 where one holds it as well,
    and else a part of the first at least."""
    one = triton.next_power_of_2(max(n, 8))
    first = one // 2
    rest = max(_part(first), triton.next_power_of_2(max(1, n - first)))
    return (first, rest) if first + rest < one else (one, 0)


def _part(block: int) -> int:
    """Into parts of how many pairs a block falls; four make a byte of bits."""
    return max(4, block // 32)


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
    again,
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
    if n_hit > ROOM:  # rows are counted, then named
        tl.store(again + 1 + tl.atomic_add(again, 1), row.to(tl.int32))
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
    again,
    n_features,
    k,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The rows that are named in `again`, where the groups that may hold one of the largest did not fit their room."""
    cols = tl.arange(0, BLOCK)
    for i in range(tl.program_id(0), tl.load(again), tl.num_programs(0)):
        row = tl.load(again + 1 + i).to(tl.int64)
        if WIDE:
            threshold, n_above = _search(pre_acts, bias, row, n_features, k, True, BITS, BLOCK)
            above = 0
            equal = 0
            for begin in range(0, n_features, BLOCK):
                key = _row_keys(pre_acts, bias, row, begin + cols, n_features, True, BITS)
                above, equal = _emit(key, begin + cols, row, above, equal, n_above, threshold, values, indices, k, BITS)
        else:
            key = _row_keys(pre_acts, bias, row, cols, n_features, True, BITS)
            threshold = _largest_reached(key, k, 0, tl.max(key, 0) + 1)
            n_above = tl.sum((key > threshold).to(tl.int32), 0)
            _emit(key, cols, row, 0, 0, n_above, threshold, values, indices, k, BITS)


@no_type_check
@triton.jit
def _keep_pairs(pre_acts, codes, active, n_pairs, k, BLOCK: tl.constexpr, REST: tl.constexpr, PART: tl.constexpr):
    """Two bf16 keys a word: with bit 15 of both halves set, one addition compares both with a candidate.

    A row lies in registers as BLOCK pairs and REST more.
    """
    row = tl.program_id(0).to(tl.int64)
    pre_acts += row * n_pairs
    x = _positive_pairs(pre_acts, tl.arange(0, BLOCK), n_pairs)
    y = x
    if REST:
        y = _positive_pairs(pre_acts, BLOCK + tl.arange(0, REST), n_pairs)
    top = tl.max(tl.maximum(x >> 16, x & 0xFFFF), 0)
    if REST:
        top = tl.maximum(top, tl.max(tl.maximum(y >> 16, y & 0xFFFF), 0))
    guess = tl.maximum(top - 512, 0)  # sixteen times smaller than the largest
    n = _n_reach(x, y, guess, BLOCK, REST)
    low, n_low = tl.where(n >= k, guess, 0), tl.where(n >= k, n, 2 * n_pairs)
    high, n_high = tl.where(n >= k, top + 1, guess), tl.where(n >= k, 0, n)
    while high - low > 1:  # between halving and the secant: seven rounds where halving takes ten
        width = high - low
        margin = tl.maximum(width // 8, 1)
        step = width * (n_low - k) // tl.maximum(n_low - n_high, 1)
        middle = low + tl.minimum(tl.maximum(step, margin), width - margin)
        n = _n_reach(x, y, middle, BLOCK, REST)
        low, n_low = tl.where(n >= k, middle, low), tl.where(n >= k, n, n_low)
        high, n_high = tl.where(n >= k, high, middle), tl.where(n >= k, n_high, n)
    room = k - _n_reach(x, y, low + 1, BLOCK, REST)
    codes += row * n_pairs
    if active is not None:
        active += row * (n_pairs // 4)
    room = _keep_block(x, 0, low, room, pre_acts, codes, active, n_pairs, BLOCK, PART)
    if REST:
        _keep_block(y, BLOCK, low, room, pre_acts, codes, active, n_pairs, REST, PART)


@no_type_check
@triton.jit
def _keep_block(x, first, low, room, pre_acts, codes, active, n_pairs, BLOCK: tl.constexpr, PART: tl.constexpr):
    """Write what stays of a block: what is above `low`, and of its equals as many as there is room for, from the first
    on: whole parts of the block, then some of one part. Returns the room that is left."""
    PARTS: tl.constexpr = BLOCK // PART
    equal = _n_halves(_reach(x, low) ^ _reach(x, low + 1))
    of_part = tl.sum(tl.reshape(equal, [PARTS, PART]), 1)
    whole = tl.sum((tl.cumsum(of_part, 0) <= room).to(tl.int32), 0)
    left = room - tl.sum(tl.where(tl.arange(0, PARTS) < whole, of_part, 0), 0)
    i = tl.arange(0, BLOCK)
    begin = whole * PART
    kept = x & (_reach(x, tl.where(i < begin, low, low + 1)) * 0xFFFF)
    _store_pairs(kept, first, begin, codes, active, n_pairs, BLOCK, PART)
    j = tl.arange(0, PART)
    x = _positive_pairs(pre_acts, first + begin + j, n_pairs)
    above = _reach(x, low + 1)
    equal = _reach(x, low) ^ above
    upper = equal >> 16
    run = tl.cumsum(_n_halves(equal), 0)
    equal = ((equal & 1) & (run - upper <= left).to(tl.int32)) | ((upper & (run <= left).to(tl.int32)) << 16)
    kept = x & ((above | equal) * 0xFFFF)
    _store_pairs(kept, first + begin, tl.where(begin < BLOCK, PART, 0), codes, active, n_pairs, PART, PART)
    return tl.where(whole < PARTS, 0, left)


@no_type_check
@triton.jit
def _store_pairs(kept, first, hole, codes, active, n_pairs, BLOCK: tl.constexpr, PART: tl.constexpr):
    """Write pairs of a row from `first` on, and their bits, four pairs a byte, but not the PART of them at `hole`."""
    i = tl.arange(0, BLOCK)
    tl.store(codes + first + i, kept, mask=((i < hole) | (i >= hole + PART)) & (first + i < n_pairs))
    if active is not None:
        bits = ((kept + 0x7FFF7FFF) >> 15) & 0x00010001  # 1 in each half above 0
        bits = ((bits | (bits >> 15)) & 3) << (i % 4 * 2)
        j = tl.arange(0, BLOCK // 4)
        inside = ((4 * j < hole) | (4 * j >= hole + PART)) & (first + 4 * j < n_pairs)
        tl.store(active + first // 4 + j, tl.sum(tl.reshape(bits, [BLOCK // 4, 4]), 1).to(tl.uint8), mask=inside)


@no_type_check
@triton.jit
def _positive_pairs(pre_acts, i, n_pairs):
    """Pairs of a row, halves that are negative as 0."""
    pairs = tl.load(pre_acts + i, mask=i < n_pairs, other=0)
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
def _n_reach(x, y, candidate, BLOCK: tl.constexpr, REST: tl.constexpr):
    """How many halves of both blocks reach the candidate."""
    reached = _reach(x, candidate)
    if REST:
        reached = tl.sum(tl.reshape(reached, [BLOCK // REST, REST]), 0) + _reach(y, candidate)
    return _n_halves(tl.sum(reached, 0))


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
