"""A kind of SAE that the package does not know: it lives here, and says no more than it must."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from fluxsae.sae import SAE


class SoftThreshold(SAE):
    """A code is by how much a pre-activation is above `margin`; training keeps the sum of codes small.

    Args:
        d_in: width of a token.
        n_features: number of features.
        margin: what a pre-activation must be above.
        weight: of the sum of codes.
        seed: decides the initial weights.
    """

    def __init__(
        self, d_in: int, n_features: int, margin: float = 0.1, weight: float = 0.5, seed: int | None = None
    ) -> None:
        super().__init__(d_in, n_features, seed=seed)
        self.margin = margin
        self.weight = weight

    def options(self) -> dict[str, Any]:
        return {"margin": self.margin, "weight": self.weight, "seed": self.seed}

    def activate(self, pre_acts: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        return (pre_acts - self.margin).relu()

    def penalty(self, pre_acts: Float[Tensor, "N F"], codes: Float[Tensor, "N F"]) -> Float[Tensor, ""]:
        return self.weight * codes.sum(dim=1).mean()
