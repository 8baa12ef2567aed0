"""How well an SAE explains a set of tokens, exactly over the whole set however it comes in batches.

Legend: N tokens, D width, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fluxsae.sae.base import SAE, TrainOutput


class Metrics(NamedTuple):
    """How well an SAE explains a set of tokens.

    `fve` is the fraction of variance explained, `mse` the mean squared error of a channel of normalised tokens, and
    `l0` the mean number of codes above 0 for a token. `dead_fraction` is the share of features that fire on no token,
    and `density` [F] the share of tokens on which each feature fires.
    """

    n_tokens: int
    fve: float
    mse: float
    l0: float
    dead_fraction: float
    density: Float[Tensor, "F"]


class Evaluation:
    """Sums over tokens, in float64: they merge over batches and processes without rounding that shows.

    FVE = 1 - Σ_d SSE_d / Σ_d SST_d, SSE_d the squared error of channel d, SST_d the squared deviation of channel d
    from its own mean over this set. A channel's constant offset thus counts for nothing, which a scalar mean would
    reward. Normalisation multiplies both sums alike, so normalised tokens give the FVE of raw ones.
    """

    def __init__(self, d_in: int, n_features: int, device: torch.device) -> None:
        self._channels = torch.zeros(3, d_in, dtype=torch.float64, device=device)
        self._fired = torch.zeros(n_features, dtype=torch.float64, device=device)
        self._n_tokens = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, sae: SAE, tokens: Float[Tensor, "N D"]) -> None:
        """Add raw tokens. Nothing waits for the device."""
        x = sae.normalise(tokens)
        codes = sae.activate(sae.project(x))
        self._channels += channel_sums(x, sae.reconstructions(codes)[-1])
        self._fired += sae.of_all((codes > 0).sum(dim=0))
        self._n_tokens += len(x)

    def result(self, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> Metrics:
        """The metrics over everything added; `total` sums over processes. ValueError when nothing was added."""
        channels, fired, count = (total(sums) for sums in (self._channels, self._fired, self._n_tokens))
        n_tokens = int(count)
        if n_tokens == 0:
            raise ValueError("there are no held-out tokens to evaluate on; raise val_fraction or capture more prompts.")
        return Metrics(
            n_tokens=n_tokens,
            fve=float(variance_explained(channels, count)),
            mse=float(channels[2].sum() / n_tokens / channels.shape[1]),
            l0=float(fired.sum() / n_tokens),
            dead_fraction=float((fired == 0).double().mean()),
            density=(fired / n_tokens).float().cpu(),
        )


def channel_sums(x: Float[Tensor, "N D"], recon: Float[Tensor, "N D"]) -> Float64[Tensor, "3 D"]:
    """A channel's sum of x, of x², and of (x - recon)²."""
    x, recon = x.double(), recon.double()
    return torch.stack([x.sum(dim=0), x.square().sum(dim=0), (x - recon).square().sum(dim=0)])


def variance_explained(channels: Float64[Tensor, "3 D"], n_tokens: int | Tensor) -> Float64[Tensor, ""]:
    """FVE from `channel_sums` of `n_tokens` tokens, without waiting for the device."""
    total, square, error = channels
    return 1 - error.sum() / (square - total.square() / n_tokens).sum()


def batch_variance_explained(x: Float[Tensor, "N D"], run: TrainOutput) -> Tensor:
    """The FVE of one training batch, by the same formula, against the batch's own channel means."""
    return variance_explained(channel_sums(x, run.recon.detach()), len(x))
