"""How the tokens of one image become bytes and back: safetensors in bf16, fp32, or fp8 with a scale per token.

Legend: T tokens an image, N tokens, D width.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from mmap import mmap
from typing import Any, NamedTuple

import torch
from jaxtyping import BFloat16, Float, Int32
from safetensors.torch import save
from torch import Tensor

from fluxsae.shards.format import Storage

FP8_MAX = 448.0
"""The largest finite number of float8 e4m3."""

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
_BLOCK = 2**15
"""Channels decoded at a time: few enough to stay in a core's cache between two passes."""


class TokenLayout(NamedTuple):
    """Where the tensors of a safetensors file lie, in bytes from its start; `scale` is there for fp8 alone."""

    dtype: torch.dtype
    shape: tuple[int, int]
    tokens: int
    scale: int | None


def encode_tokens(tokens: Float[Tensor, "T D"], storage: Storage) -> bytes:
    """The tokens as a safetensors file with a tensor `tokens`, and for fp8 a float32 `scale` [T] to multiply it by.

    The fp8 scale is a power of two, so that decoding to bf16 is exact.
    """
    tokens = tokens.detach().to("cpu").contiguous()
    if storage == "fp8":
        largest = tokens.float().abs().amax(dim=1).clamp_min(2.0**-100)
        scale = torch.exp2(torch.ceil(torch.log2(largest / FP8_MAX)))
        return save({"tokens": (tokens.float() / scale[:, None]).to(torch.float8_e4m3fn), "scale": scale})
    return save({"tokens": tokens.to(torch.bfloat16 if storage == "bf16" else torch.float32)})


def decode_tokens(buffer: bytearray | mmap, start: int, size: int) -> Float[Tensor, "T D"]:
    """The tokens of a safetensors file at `start` in `buffer`: bf16 for bf16 and fp8, float32 for fp32.

    Without fp8 the tensor shares the buffer's memory. ValueError, without naming a file, when it does not parse.
    """
    layout = find_tokens(buffer, start, size)
    tokens = _view(buffer, layout.dtype, layout.shape, start + layout.tokens)
    if layout.scale is None:
        return tokens
    return decode_fp8(tokens, _view(buffer, torch.float32, layout.shape[:1], start + layout.scale))


def find_tokens(buffer: bytearray | mmap, start: int, size: int) -> TokenLayout:
    """Where the tokens lie in a safetensors file at `start` in `buffer`. ValueError when it does not parse."""
    length = int.from_bytes(buffer[start : start + 8], "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"its header would take {length} of {size} bytes")
    return _parse(bytes(buffer[start + 8 : start + 8 + length]), size)


@lru_cache(maxsize=256)  # the members of a set all have one header
def _parse(text: bytes, size: int) -> TokenLayout:
    try:
        header = json.loads(text)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(header, dict) or "tokens" not in header:
        raise ValueError("it holds no tensor named 'tokens'")
    body = 8 + len(text)
    dtype, shape, begin = _extent(header["tokens"], size - body)
    if len(shape) != 2:
        raise ValueError(f"its tokens have shape {list(shape)}, expected two dimensions")
    if (dtype == torch.float8_e4m3fn) != ("scale" in header):
        raise ValueError(f"its tokens are {dtype} {'with' if 'scale' in header else 'without'} a scale")
    if "scale" not in header:
        return TokenLayout(dtype, (shape[0], shape[1]), body + begin, None)
    scale_dtype, scale_shape, scale_begin = _extent(header["scale"], size - body)
    if scale_shape != shape[:1] or scale_dtype != torch.float32:
        raise ValueError(f"its scale has shape {list(scale_shape)} of {scale_dtype}, expected {[shape[0]]} of float32")
    return TokenLayout(dtype, (shape[0], shape[1]), body + begin, body + scale_begin)


def _extent(entry: Any, room: int) -> tuple[torch.dtype, tuple[int, ...], int]:
    dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if any(type(size) is not int or size < 1 for size in (*shape, end)) or type(begin) is not int:
        raise ValueError(f"a tensor has shape {shape} and bytes {begin} to {end}, expected positive integers")
    count = math.prod(shape)
    if not (0 <= begin <= end <= room and end - begin == count * dtype.itemsize and count > 0):
        raise ValueError(f"a tensor of shape {shape} does not fit its bytes {begin} to {end} of {room}")
    return dtype, tuple(shape), begin


def _view(buffer: bytearray | mmap, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    return torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


def decode_fp8(codes: Float[Tensor, "N D"], scale: Float[Tensor, "N"]) -> BFloat16[Tensor, "N D"]:
    """`codes · scale` in bf16.

    torch converts float8 number by number on a CPU, so there a table tells two channels at a time, to the same bits.
    """
    if codes.device.type != "cpu":
        return codes.to(torch.bfloat16) * scale[:, None].to(torch.bfloat16)
    mantissa, exponent = torch.frexp(scale)
    in_pairs = codes.dtype == torch.float8_e4m3fn and codes.shape[1] % 2 == 0 and codes.storage_offset() % 2 == 0
    if len(codes) == 0 or not in_pairs or not bool((mantissa == 0.5).all()):
        return (codes.float() * scale[:, None]).to(torch.bfloat16)
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    lowest = int(exponent.min()) // 8 * 8
    table = _pairs(lowest, (int(exponent.max()) - lowest) // 8 * 8 + 8)
    first = ((exponent - lowest) * 2**16 + 2**15)[:, None]
    pairs, target = codes.view(torch.int16), out.view(torch.int32)
    n_rows = max(1, _BLOCK // codes.shape[1])
    for i in range(0, len(codes), n_rows):
        index = pairs[i : i + n_rows].to(torch.int32).add_(first[i : i + n_rows])
        torch.index_select(table, 0, index.flatten(), out=target[i : i + n_rows].view(-1))
    return out


@lru_cache(maxsize=8)
def _pairs(lowest: int, n: int) -> Int32[Tensor, "pairs"]:
    """Two channels in bf16 for every two bytes, taken as a signed number, and each of n powers of two."""
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float8_e4m3fn).float()
    scale = torch.exp2(torch.arange(lowest - 1, lowest - 1 + n, dtype=torch.float32))
    return (codes * scale[:, None]).to(torch.bfloat16).view(torch.int32).flatten()
