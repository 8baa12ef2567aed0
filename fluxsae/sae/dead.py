"""What training does for features that no longer fire: an auxiliary loss, or a new start at tokens badly explained.

Legend: N tokens, D width, F features, M dead features.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim import Optimizer

from fluxsae.sae.base import SAE
from fluxsae.sae.feature_rows import set_rows, whole


def aux_error(
    sae: SAE,
    x: Float[Tensor, "N D"],
    error: Float[Tensor, "N D"],
    dead: Int[Tensor, "M"],
    aux_k: int,
    weights: Float[Tensor, "N"] | None = None,
) -> Float[Tensor, ""]:
    """How badly the `aux_k` strongest dead features explain what the others left, x - recon (AuxK, Gao et al. 2024).

    The squared error, summed over channels and averaged over normalised tokens, each with its weight where there are
    weights. Gradients reach dead features only.
    """
    squared = (error.detach() - sae.reconstruct_from(x, dead, min(aux_k, len(dead)))).square().sum(dim=1)
    return (squared if weights is None else weights * squared).mean()


@torch.no_grad()
def draw_directions(
    sae: SAE,
    x: Float[Tensor, "N D"],
    error: Float[Tensor, "N D"],
    n_dead: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "M D"]:
    """Unit directions of normalised tokens, drawn with probability ∝ the square of their loss (Bricken et al. 2023)."""
    loss = error.square().sum(dim=1)
    chances = (loss / loss.max()).square() + 1e-9
    alike = n_dead > len(chances)  # else no two features start alike, as twins would stay
    chosen = torch.multinomial(chances, n_dead, replacement=alike, generator=generator)
    return normalize(x[chosen] - whole(sae.b_dec), dim=1)


@torch.no_grad()
def resample(sae: SAE, optimizer: Optimizer, dead: Int[Tensor, "M"], directions: Float[Tensor, "M D"]) -> None:
    """Restart dead features along unit `directions`.

    The encoder row gets `restart_gain` of the mean length of the living ones, the bias 0, and Adam's moments 0: kept,
    they would drive the new feature where the old one was going. The step count, one a parameter, stays.
    """
    alive = torch.ones(sae.n_features, dtype=torch.bool, device=dead.device).index_fill_(0, dead, False)
    lengths = whole(sae.W_enc.norm(dim=1))
    length = torch.where(alive.any(), (lengths * alive).sum() / alive.sum().clamp_min(1), lengths.mean())
    sae.restart(dead, directions, sae.restart_gain * length)
    for parameter in sae.per_feature:
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                set_rows(value, dead, 0.0)
