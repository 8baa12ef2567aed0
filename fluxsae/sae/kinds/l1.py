"""L1 (Bricken et al. 2023): every positive pre-activation is a code, and training keeps their sum small.

Legend: N tokens, F features.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fluxsae.sae.base import SAE, FusedForm, ThresholdForm
from fluxsae.sae.sharding import Sharded


class L1(SAE):
    """ReLU codes; training adds `l1` times the mean over tokens of the codes' sum.

    Args:
        d_in: width of a token.
        n_features: number of features.
        l1: weight of the penalty, beside a squared error summed over channels of normalised tokens.
        groups: prefixes of a Matryoshka SAE, see `SAE`.
        seed: decides the initial weights, see `SAE`.
    """

    def __init__(
        self, d_in: int, n_features: int, l1: float = 1.0, groups: list[int] | None = None, seed: int | None = None
    ) -> None:
        super().__init__(d_in, n_features, groups, seed)
        self.l1 = l1

    def options(self) -> dict[str, Any]:
        return {"l1": self.l1, **super().options()}

    def activate(self, pre_acts: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        return pre_acts.relu()

    def penalty(self, pre_acts: Float[Tensor, "N F"], codes: Float[Tensor, "N F"]) -> Float[Tensor, ""]:
        # Decoder rows have unit length, so the sum of codes cannot be made small by making the rows long.
        return self.l1 * codes.sum(dim=1).mean()

    def threshold_form(self) -> ThresholdForm:
        return ThresholdForm(self.W_enc, self.b_enc, torch.zeros_like(self.b_enc))

    def fused_form(self) -> FusedForm | None:
        return FusedForm(None, self.l1) if len(self.groups) == 1 else None

    def sharded_form(self) -> type[SAE]:
        return _ShardedL1


class _ShardedL1(Sharded, L1):
    """L1, whose features do not compete."""
