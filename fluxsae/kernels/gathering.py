"""Gathers fp8 tokens and decodes them on the way (Triton): three bytes a number are moved, in three passes nine.

Why. Mixing tokens on the device picks rows at random. PyTorch would gather codes, gather scales, convert, and multiply,
each through memory; here a row is read once in 8 bits and written once in 16.
Legend: N rows of memory, M of them wanted, D width.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import BFloat16, Float, Int64
from torch import Tensor

_BLOCK = 4096


def gather_decoded(
    codes: Float[Tensor, "N D"], scale: Float[Tensor, "N"], index: Int64[Tensor, "M"]
) -> BFloat16[Tensor, "M D"]:
    """`codes[index] · scale[index]` in bf16, of e4m3 codes; rounded once, as `decode_fp8` does."""
    width = codes.shape[1]
    out = torch.empty(len(index), width, dtype=torch.bfloat16, device=codes.device)
    if len(index):
        block = min(_BLOCK, triton.next_power_of_2(width))
        _gather_decoded[(len(index),)](codes.view(torch.uint8), scale, index, out, width, BLOCK=block)
    return out


@no_type_check
@triton.jit
def _gather_decoded(codes, scale, index, out, width, BLOCK: tl.constexpr):
    row = tl.load(index + tl.program_id(0))
    times = tl.load(scale + row)
    source, target = codes + row * width, out + tl.program_id(0).to(tl.int64) * width
    for begin in range(0, width, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        code = tl.load(source + d, mask=d < width, other=0).to(tl.int32)
        # Sign, exponent and mantissa where float32 has them; exponents are counted from 7, there from 127.
        value = (((code & 128) << 24) | ((code & 127) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
        value = tl.where((code & 127) == 127, float("nan"), value) * times
        tl.store(target + d, value.to(tl.bfloat16), mask=d < width)
