"""What training minimises of each token: its squared error, weighted so that no token outweighs the rest.

Legend: N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from fluxsae.sae.base import TrainOutput


def squared_errors(x: Float[Tensor, "N D"], run: TrainOutput) -> Float[Tensor, "N"]:
    """‖e_n‖² of normalised tokens, summed over channels; of a Matryoshka SAE, the mean over its reconstructions."""
    errors = [(x - recon).square().sum(dim=1) for recon in (*run.partial, run.recon)]
    return errors[0] if len(errors) == 1 else torch.stack(errors).mean(dim=0)


@torch.no_grad()
def token_weights(
    squared: Float[Tensor, "N"], clip: float, total: Callable[[Tensor], Tensor] = lambda sums: sums
) -> Float[Tensor, "N"]:
    """The weight of each token's squared error, s_n = min(1, clip · mean_m ‖e_m‖ / ‖e_n‖), without gradients.

    Each token's error norm is clipped to `clip` times the batch mean. So one outlier cannot damage the dictionary.
    Ordinary tokens have a weight of exactly 1. The weights are known before any gradient, which would not be so if the
    gradient's norm were clipped.

    The mean is over all processes: `total` sums over them. A `clip` of 0 switches clipping off.
    """
    if clip == 0:
        return torch.ones_like(squared)
    lengths = squared.sqrt()
    length, count = total(torch.stack([lengths.sum(), lengths.new_full((), len(lengths))]))
    longest = clip * length / count
    return torch.where(lengths <= longest, 1.0, longest / lengths)
