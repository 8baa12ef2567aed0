"""Channels that stand out from all others, and what rounding to fp8 costs.

A few channels of a transformer are often many times larger than the rest, on all tokens or on some (Dettmers et al.
2022, Sun et al. 2024). Their variance is what an SAE's squared error sees first; a token's largest channel sets its
scale in fp8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fluxsae.shards.encoding import decode_tokens, encode_tokens
from fluxsae.shards.read import ShardSet

STANDS_OUT = 6.0
"""A channel does when its root mean square is this many times the median channel's."""
_NAMED = 5


class Outlier(NamedTuple):
    """A channel: its mean and deviation, in deviations of the median channel, and its share of the whole variance."""

    channel: int
    mean: float
    deviation: float
    share: float

    def __str__(self) -> str:
        return (
            f"{self.channel} ({self.share:.1%} of the variance, mean {self.mean:+.3g}, deviation {self.deviation:.3g})"
        )


class Channels(NamedTuple):
    """What `describe_channels` finds; outliers with the strongest first.

    `fp8_loss` is the share of the variance that fp8 would round away, None for a set that is stored as fp8.
    """

    n_channels: int
    outliers: list[Outlier]
    fp8_loss: float | None

    def __str__(self) -> str:
        named = ", ".join(map(str, self.outliers[:_NAMED]))
        more = f" and {len(self.outliers) - _NAMED} more" if len(self.outliers) > _NAMED else ""
        lost = f"; as fp8 it would lose {self.fp8_loss:.3%} of the variance" if self.fp8_loss is not None else ""
        if not self.outliers:
            return f"no channel stands out among {self.n_channels:,}{lost}"
        verb = "stands" if len(self.outliers) == 1 else "stand"
        share = sum(outlier.share for outlier in self.outliers)
        return (
            f"{len(self.outliers)} of {self.n_channels:,} channels {verb} out, with {share:.1%} of the variance: "
            f"{named}{more}{lost}"
        )


def describe_channels(shards: ShardSet, n_tokens: int = 2**12) -> Channels:
    """Find channels that stand out in a set of tokens, and what fp8 would lose.

    It reads about `n_tokens` tokens, from images spread evenly over the set. `print` shows the result as a sentence.
    """
    images = shards.with_tokens
    n_images = min(len(images), max(1, n_tokens // shards.spec.n_tokens))
    shift: Tensor | None = None
    sums, squares, lost, n = torch.zeros(()), torch.zeros(()), 0.0, 0
    for i in range(n_images):
        stored = shards.tokens(images[i * len(images) // n_images]).float()
        tokens = stored.double()
        shift = tokens.mean(dim=0) if shift is None else shift
        sums = sums + (tokens - shift).sum(dim=0)
        squares = squares + (tokens - shift).square().sum(dim=0)
        n += len(tokens)
        if shards.metadata.storage != "fp8":
            data = bytearray(encode_tokens(stored, "fp8"))
            lost += float((decode_tokens(data, 0, len(data)).double() - tokens).square().sum())
    assert shift is not None
    mean, variance = shift + sums / n, squares / n - (sums / n).square()
    total = float(variance.sum()) or 1.0
    rms = (mean.square() + variance).sqrt()
    unit = float(variance.median().sqrt()) or 1.0
    found = (rms > STANDS_OUT * rms.median()).nonzero().flatten().tolist()
    outliers = [
        Outlier(c, float(mean[c]) / unit, float(variance[c].sqrt()) / unit, float(variance[c]) / total)
        for c in sorted(found, key=lambda c: -float(rms[c]))
    ]
    return Channels(len(mean), outliers, lost / (n * total) if shards.metadata.storage != "fp8" else None)
