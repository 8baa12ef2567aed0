"""Rounds float32 numbers to fp8 (e4m3) inside other kernels (Triton)."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@no_type_check
@triton.jit
def to_fp8(value, scale):
    """value · scale as float8e4nv, at most 448 either way."""
    value = tl.minimum(tl.maximum(value * scale, -448.0), 448.0)
    # To three bits behind the point, half to even, before it is converted: Triton's interpreter loses the carry there.
    bits = value.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    return bits.to(tl.float32, bitcast=True).to(tl.float8e4nv)
