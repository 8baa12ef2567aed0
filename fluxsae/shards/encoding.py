"""How the tokens of one image become bytes and back: safetensors in bf16, fp32, or fp8 with a scale per token.

Legend: T tokens an image, D width.
"""

from __future__ import annotations

import json
import math
from mmap import mmap
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from fluxsae.shards.format import Storage

FP8_MAX = 448.0
"""The largest finite number of float8 e4m3."""

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}


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
    length = int.from_bytes(buffer[start : start + 8], "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"its header would take {length} of {size} bytes")
    try:
        header = json.loads(bytes(buffer[start + 8 : start + 8 + length]))
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(header, dict) or "tokens" not in header:
        raise ValueError("it holds no tensor named 'tokens'")
    body, room = start + 8 + length, size - 8 - length
    tokens = _view(buffer, header["tokens"], body, room)
    if tokens.ndim != 2:
        raise ValueError(f"its tokens have shape {list(tokens.shape)}, expected two dimensions")
    if "scale" not in header:
        return tokens
    scale = _view(buffer, header["scale"], body, room)
    if scale.shape != tokens.shape[:1]:
        raise ValueError(f"its scale has shape {list(scale.shape)}, expected {list(tokens.shape[:1])}")
    return (tokens.float() * scale[:, None]).to(torch.bfloat16)


def _view(buffer: bytearray | mmap, entry: Any, body: int, room: int) -> Tensor:
    dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if any(type(size) is not int or size < 1 for size in (*shape, end)) or type(begin) is not int:
        raise ValueError(f"a tensor has shape {shape} and bytes {begin} to {end}, expected positive integers")
    count = math.prod(shape)
    if not (0 <= begin <= end <= room and end - begin == count * dtype.itemsize and count > 0):
        raise ValueError(f"a tensor of shape {shape} does not fit its bytes {begin} to {end} of {room}")
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=body + begin).view(shape)
