"""The few numbers of a step, each group in one launch: tokens' weights, the loss, and Adam's factors (Triton).

Why. A step asks for some dozens of small numbers: lengths, their mean, weights, the loss, Adam's corrections. Each
small PyTorch operation costs 5 µs of the host and 2 of the device, some 0.2 ms a step together. They also must lie on
the device, as a recorded graph sees only memory, and may not wait for the host.
Legend: N tokens, D width, P tiles of channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_CHUNK = 4096


class Weighed(NamedTuple):
    """`token_weights` of errors, and means over tokens and channels of weighted and plain squared errors."""

    weights: Float[Tensor, "N"]
    loss: Float[Tensor, ""]
    mse: Float[Tensor, ""]


def weigh_tokens(
    squares: Float[Tensor, "P N"], clip: float, d_in: int, lengths: Float[Tensor, "2"] | None = None
) -> Weighed:
    """From squared lengths of errors, whose parts the P tiles hold; `clip` as in `token_weights`.

    `lengths` are the `sum_lengths` of all processes, where there are others.
    """
    n_tiles, n_tokens = squares.shape
    weights = torch.empty(n_tokens, device=squares.device)
    means = torch.empty(2, device=squares.device)
    _weigh_tokens[(1,)](
        *(squares, weights, means, lengths, n_tokens, n_tiles, clip, d_in),
        CHUNK=_CHUNK,
        num_warps=16,
    )
    return Weighed(weights, *means.unbind())


def sum_lengths(squares: Float[Tensor, "P N"]) -> Float[Tensor, "2"]:
    """The sum of the errors' lengths, and how many errors there are."""
    sums = torch.empty(2, device=squares.device)
    _sum_lengths[(1,)](squares, sums, squares.shape[1], len(squares), CHUNK=_CHUNK, num_warps=16)
    return sums


def add_penalty(
    loss: Float[Tensor, ""], sums: Float[Tensor, "F"], penalty: Float[Tensor, ""], factor: float
) -> Float[Tensor, ""]:
    """loss + factor · penalty · Σ sums."""
    total = torch.empty_like(loss)
    _add_penalty[(1,)](loss, sums, penalty, total, len(sums), factor, CHUNK=_CHUNK, num_warps=16)
    return total


def adam_factors(
    loss: Float[Tensor, ""],
    lr: Float[Tensor, ""],
    steps: list[Float[Tensor, ""]],
    updates: Int[Tensor, "2"],
    betas: tuple[float, float],
    factor: float,
    eps: float,
) -> Float[Tensor, "5"]:
    """What the row updates read from memory, so that a replayed graph sees each step's own numbers.

    Counts a step in each of four `steps`, unless the loss is not finite; in `updates`, how often this was called and
    the first call whose loss was not finite, -1 for none. Returns lr / (1 - β₁ᵗ), 1 / √(1 - β₂ᵗ), the
    gradient's factor, whether to step at all (else 0), and ε.
    """
    factors = torch.empty(5, device=loss.device)
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in betas]
    _adam_factors[(1,)](loss, lr, *steps, updates, factors, *logs, factor, eps, num_warps=1)
    return factors


@no_type_check
@triton.jit
def _squares(squares, n, n_tokens, n_tiles, CHUNK: tl.constexpr):
    total = tl.zeros([CHUNK], tl.float32)
    for tile in range(n_tiles):
        total += tl.load(squares + tile * n_tokens + n, mask=n < n_tokens, other=0.0)
    return total


@no_type_check
@triton.jit
def _length(squares, n_tokens, n_tiles, CHUNK: tl.constexpr):
    total = tl.zeros([CHUNK], tl.float32)
    for begin in range(0, n_tokens, CHUNK):
        total += tl.sqrt(_squares(squares, begin + tl.arange(0, CHUNK), n_tokens, n_tiles, CHUNK))
    return tl.sum(total, 0)


@no_type_check
@triton.jit
def _sum_lengths(squares, sums, n_tokens, n_tiles, CHUNK: tl.constexpr):
    tl.store(sums, _length(squares, n_tokens, n_tiles, CHUNK))
    tl.store(sums + 1, 1.0 * n_tokens)


@no_type_check
@triton.jit
def _weigh_tokens(squares, weights, means, lengths, n_tokens, n_tiles, clip, d_in, CHUNK: tl.constexpr):
    if lengths is not None:
        longest = clip * tl.load(lengths) / tl.load(lengths + 1)
    else:
        longest = clip * _length(squares, n_tokens, n_tiles, CHUNK) / n_tokens
    plain = tl.zeros([CHUNK], tl.float32)
    weighted = tl.zeros([CHUNK], tl.float32)
    for begin in range(0, n_tokens, CHUNK):
        n = begin + tl.arange(0, CHUNK)
        square = _squares(squares, n, n_tokens, n_tiles, CHUNK)
        length = tl.sqrt(square)
        short = (length <= longest) | (clip == 0)
        weight = tl.where(short, 1.0, longest / tl.where(short, 1.0, length))
        tl.store(weights + n, weight, mask=n < n_tokens)
        plain += square
        weighted += tl.where(n < n_tokens, square * weight, 0.0)
    tl.store(means, tl.sum(weighted, 0) / n_tokens / d_in)
    tl.store(means + 1, tl.sum(plain, 0) / n_tokens / d_in)


@no_type_check
@triton.jit
def _add_penalty(loss, sums, penalty, total, n_features, factor, CHUNK: tl.constexpr):
    parts = tl.zeros([CHUNK], tl.float32)
    for begin in range(0, n_features, CHUNK):
        f = begin + tl.arange(0, CHUNK)
        parts += tl.load(sums + f, mask=f < n_features, other=0.0)
    tl.store(total, tl.load(loss) + factor * tl.load(penalty) * tl.sum(parts, 0))


@no_type_check
@triton.jit
def _adam_factors(loss, lr, step1, step2, step3, step4, updates, factors, log_beta1, log_beta2, factor, eps):
    ok = (tl.abs(tl.load(loss)) < float("inf")).to(tl.float32)
    made = tl.load(updates)
    bad = tl.load(updates + 1)
    tl.store(updates, made + 1)
    tl.store(updates + 1, tl.where((ok == 0) & (bad < 0), made, bad))
    t = tl.load(step1) + ok
    tl.store(step1, t)
    tl.store(step2, tl.load(step2) + ok)
    tl.store(step3, tl.load(step3) + ok)
    tl.store(step4, tl.load(step4) + ok)
    correction1 = 1 - tl.exp(t.to(tl.float64) * log_beta1)  # in float32 its first digits would cancel
    correction2 = 1 - tl.exp(t.to(tl.float64) * log_beta2)
    tl.store(factors, (tl.load(lr) / correction1).to(tl.float32))
    tl.store(factors + 1, (1 / tl.sqrt(correction2)).to(tl.float32))
    tl.store(factors + 2, factor)
    tl.store(factors + 3, ok)
    tl.store(factors + 4, eps)
