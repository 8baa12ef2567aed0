"""Pools an image's codes over its tokens while they are still in registers (Triton): codes never reach memory.

Why. S needs the largest code of each feature over an image's tokens. The codes themselves, 256 tokens × 12,288 features
in bf16, are 6 MB an image; writing and reading them would cost more than the product that makes them at 29,500 images a
second. What is wanted of them is 8 bytes a feature and image: a maximum and a count.

A tile of the encoder's product is some features by up to 256 tokens of one image, with tokens along the accelerator's
rows of registers, so that a maximum over tokens is taken inside each thread before any two speak to each other.
Legend: B images, T tokens an image, N = B · T tokens, D width, F features, K kept.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

FEATURES = 128
TOKENS = 256
DEPTH = 64
"""Sizes of a tile of the product: what two warp groups of an H100 can hold, and of what they read at a time."""
_STAGES = 4
"""How many times as much is on its way to them, if the device's shared memory has room for it."""
_TOGETHER = 16
"""Images that pass by the same weights before the next ones: few enough to stay in the level-2 cache meanwhile."""
_BLOCK = 1024


def pool_thresholded(
    tokens: Float[Tensor, "B T D"],
    weight: Float[Tensor, "F D"],
    bias: Float[Tensor, "F"],
    threshold: Float[Tensor, "F"],
    scores: Float[Tensor, "B F"],
    fired: Int[Tensor, "B F"],
) -> None:
    """Write the largest code over tokens, and the number of tokens with one; a code is what is above its threshold.

    Tokens and weights are multiplied as they are, in bf16 on tensor cores, and added up, compared and written in
    float32. A score whose tokens hold NaN is NaN.
    """
    n_images, n_tokens, d_in = tokens.shape
    n_features = len(weight)
    tile = min(TOKENS, max(16, triton.next_power_of_2(n_tokens)))
    _pool_thresholded[(triton.cdiv(n_features, FEATURES) * n_images,)](
        *(tokens, weight, bias, threshold, scores, fired, n_images, n_tokens, d_in, n_features),
        WHOLE=d_in % DEPTH == 0,
        TOGETHER=_TOGETHER,
        FEATURES=FEATURES,
        TOKENS=tile,
        DEPTH=DEPTH,
        num_warps=8,
        num_stages=_stages((FEATURES + tile) * DEPTH * tokens.itemsize, tokens.device),
    )


def pool_chosen(
    values: Float[Tensor, "N K"],
    indices: Int[Tensor, "N K"],
    first_token: int,
    n_tokens: int,
    scores: Float[Tensor, "B F"],
    fired: Int[Tensor, "B F"],
) -> None:
    """Raise scores to the chosen codes of N tokens, and count those above 0.

    The tokens follow each other from the `first_token` of all B · T on, `n_tokens` an image. Positive floats order as
    their bits do, so maxima are of integers, and the result does not depend on who comes first.
    """
    _pool_chosen[(triton.cdiv(values.numel(), _BLOCK),)](
        *(values, indices, scores.view(torch.int32), fired, values.numel(), values.shape[1]),
        *(first_token, n_tokens, scores.shape[1]),
        BLOCK=_BLOCK,
    )


def _stages(n_bytes: int, device: torch.device) -> int:
    if device.type != "cuda":
        return _STAGES
    room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin - 2**13  # which a reduction takes
    return max(1, min(_STAGES, room // n_bytes))


@no_type_check
@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@no_type_check
@triton.jit
def _pool_thresholded(
    tokens,
    weight,
    bias,
    threshold,
    scores,
    fired,
    n_images,
    n_tokens,
    d_in,
    n_features,
    WHOLE: tl.constexpr,
    TOGETHER: tl.constexpr,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    per_group = TOGETHER * tl.cdiv(n_features, FEATURES)
    first_image = tl.program_id(0) // per_group * TOGETHER
    n_together = tl.minimum(n_images - first_image, TOGETHER)
    place = tl.program_id(0) % per_group
    image = first_image + place % n_together
    f = place // n_together * FEATURES + tl.arange(0, FEATURES)
    d = tl.arange(0, DEPTH)
    # What lies outside is read as the last row once more, so that the loop needs no masks along rows.
    weights = weight + tl.minimum(f, n_features - 1)[:, None] * d_in + d[None, :]
    best = tl.full([FEATURES], float("-inf"), tl.float32)
    n_fired = tl.zeros([FEATURES], tl.int32)
    for begin in range(0, n_tokens, TOKENS):
        t = begin + tl.arange(0, TOKENS)
        row = tl.minimum(t, n_tokens - 1)
        columns = tokens + image.to(tl.int64) * n_tokens * d_in + row[None, :] * d_in + d[:, None]
        total = tl.zeros([FEATURES, TOKENS], tl.float32)
        for depth in range(0, d_in, DEPTH):
            if WHOLE:
                w = tl.load(weights + depth)
                x = tl.load(columns + depth)
            else:
                w = tl.load(weights + depth, mask=d[None, :] < d_in - depth, other=0.0)
                x = tl.load(columns + depth, mask=d[:, None] < d_in - depth, other=0.0)
            total = tl.dot(w, x, total, input_precision="ieee")
        least = tl.load(threshold + f, mask=f < n_features, other=0.0)  # late, as the product takes all registers
        value = total + tl.load(bias + f, mask=f < n_features, other=0.0)[:, None]
        best = _larger(best, tl.reduce(value, 1, _larger))
        above = (value > least[:, None]) & (t < n_tokens)[None, :]
        n_fired += tl.sum(above.to(tl.int32), 1)
    at = image.to(tl.int64) * n_features + f
    least = tl.load(threshold + f, mask=f < n_features, other=0.0)
    tl.store(scores + at, tl.where(best <= least, 0.0, best), mask=f < n_features)
    tl.store(fired + at, n_fired, mask=f < n_features)


@no_type_check
@triton.jit
def _pool_chosen(values, indices, score_bits, fired, n, k, first_token, n_tokens, n_features, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + i, mask=i < n, other=0.0)
    bits = value.to(tl.int32, bitcast=True)  # NaN's are above those of any number
    image = (first_token + i // k) // n_tokens
    at = image.to(tl.int64) * n_features + tl.load(indices + i, mask=i < n, other=0)
    tl.atomic_max(score_bits + at, bits, mask=bits > 0, sem="relaxed")
    tl.atomic_add(fired + at, 1, mask=bits > 0, sem="relaxed")
