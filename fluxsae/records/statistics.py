"""Statistics of tokens, which travel with a shard set and with every SAE that is trained on it.

Legend: D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float64
from torch import Tensor


class Sums(NamedTuple):
    """Statistics of some tokens in a form that merges: count, mean, sum of squared distances to it, sum of norms."""

    n_tokens: int
    mean: Float64[Tensor, "D"]
    squares: float
    norms: float

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "mean": self.mean.tolist()}


class Statistics(NamedTuple):
    """Statistics of all tokens of a set, as they are stored.

    `scale` is sqrt(D / E‖x - mean‖²): (x - mean) · scale has unit variance, averaged over channels.
    `mean_norm` is E‖x‖ of raw tokens, the unit of steering strength.
    """

    n_tokens: int
    mean: Float64[Tensor, "D"]
    scale: float
    mean_norm: float

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "mean": self.mean.tolist()}


def merge_sums(sums: Sequence[Sums]) -> Sums:
    """Sums over all parts (Chan et al. 1979). They are merged in the given order, so the result is always the same."""
    total = sums[0]
    for part in sums[1:]:
        n = total.n_tokens + part.n_tokens
        delta = part.mean - total.mean
        between = float((delta.numpy() ** 2).sum()) * total.n_tokens * part.n_tokens / n
        total = Sums(
            n_tokens=n,
            mean=total.mean + delta * (part.n_tokens / n),
            squares=total.squares + part.squares + between,
            norms=total.norms + part.norms,
        )
    return total


def statistics_of(sums: Sums) -> Statistics:
    variance = sums.squares / sums.n_tokens
    scale = math.sqrt(sums.mean.numel() / variance) if variance > 0 else 1.0
    return Statistics(sums.n_tokens, sums.mean, scale, sums.norms / sums.n_tokens)
