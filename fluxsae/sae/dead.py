"""What training does for features that no longer fire: an auxiliary loss, or a new start at tokens badly explained.

Legend: N tokens, D width, F features, M dead features.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim import Optimizer

from fluxsae.sae import kernels
from fluxsae.sae.coder import SAE


def aux_error(
    sae: SAE, x: Float[Tensor, "N D"], error: Float[Tensor, "N D"], dead: Int[Tensor, "M"], aux_k: int
) -> Float[Tensor, ""]:
    """How badly the `aux_k` strongest dead features explain what the others left, x - recon (AuxK, Gao et al. 2024).

    The squared error, summed over channels and averaged over normalised tokens. Gradients reach dead features only.
    """
    pre = (x - sae.b_dec.detach()) @ sae.W_enc[dead].T + sae.b_enc[dead]
    indices = kernels.largest(pre.detach(), min(aux_k, len(dead)))
    recon = kernels.decode(pre.gather(1, indices).relu(), indices, sae.W_dec[dead])
    return (error.detach() - recon).square().sum(dim=1).mean()


@torch.no_grad()
def draw_directions(
    sae: SAE, x: Float[Tensor, "N D"], error: Float[Tensor, "N D"], n_dead: int
) -> Float[Tensor, "M D"]:
    """Unit directions of normalised tokens, drawn with probability ∝ the square of their loss (Bricken et al. 2023)."""
    loss = error.square().sum(dim=1)
    chosen = torch.multinomial((loss / loss.max()).square() + 1e-9, n_dead, replacement=True)
    return normalize(x[chosen] - sae.b_dec, dim=1)


@torch.no_grad()
def resample(sae: SAE, optimizer: Optimizer, dead: Int[Tensor, "M"], directions: Float[Tensor, "M D"]) -> None:
    """Restart dead features along unit `directions`.

    The encoder row gets `restart_gain` of the mean length of the living ones, the bias 0, and Adam's moments 0: kept,
    they would drive the new feature where the old one was going. The step count, one a parameter, stays.
    """
    alive = torch.ones(sae.n_features, dtype=torch.bool, device=dead.device).index_fill_(0, dead, False)
    lengths = sae.W_enc.norm(dim=1)
    length = torch.where(alive.any(), (lengths * alive).sum() / alive.sum().clamp_min(1), lengths.mean())
    sae.W_dec[dead] = directions
    sae.W_enc[dead] = sae.restart_gain * length * directions
    sae.b_enc[dead] = 0.0
    for parameter in (sae.W_enc, sae.b_enc, sae.W_dec):
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[dead] = 0.0
