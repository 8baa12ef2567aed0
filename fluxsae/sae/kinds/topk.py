"""TopK (Gao et al. 2024): the k largest pre-activations of a token.

Legend: N tokens, D width, F features.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fluxsae.kernels.reference import decode, largest
from fluxsae.sae.base import SAE, FusedForm, TrainOutput, checked_k
from fluxsae.sae.sharding import Sharded


class TopK(SAE):
    """The k largest pre-activations of a token, where positive.

    Args:
        d_in: width of a token.
        n_features: number of features.
        k: number of features kept for each token.
        groups: prefixes of a Matryoshka SAE, see `SAE`.
        seed: decides the initial weights, see `SAE`.
        encoder_gain: initial length of the encoder's rows. Small initial codes lead to a better FVE (docs/log.md). The
            gain does not change which codes are chosen.
    """

    restart_gain: ClassVar[float] = 1.0  # a shorter row would never be among the k largest

    def __init__(
        self,
        d_in: int,
        n_features: int,
        k: int,
        groups: list[int] | None = None,
        seed: int | None = None,
        encoder_gain: float = 0.1,
    ) -> None:
        super().__init__(d_in, n_features, groups, seed, encoder_gain)
        self.k = checked_k(k, n_features)

    @property
    def expected_l0(self) -> float:
        return float(self.k)

    def options(self) -> dict[str, Any]:
        return {"k": self.k, **super().options()}

    def top_k_form(self) -> int:
        return self.k

    def fused_form(self) -> FusedForm | None:
        return FusedForm(self.k) if len(self.groups) == 1 else None

    def sharded_form(self) -> type[SAE]:
        return _ShardedTopK

    def activate(self, pre_acts: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        flat = pre_acts.reshape(-1, self.n_features)
        indices = largest(flat.detach(), self.k)
        codes = torch.zeros_like(flat).scatter(1, indices, flat.gather(1, indices).relu())
        return codes.view_as(pre_acts)

    def training_forward(self, x: Float[Tensor, "N D"]) -> TrainOutput:
        if len(self.groups) > 1:
            return super().training_forward(x)  # a product a group: dense codes split by columns, sparse ones do not
        pre = self.project(x)
        indices = largest(pre.detach(), self.k)
        values = pre.gather(1, indices).relu()
        active = values.detach() > 0
        fired = torch.zeros(self.n_features, device=x.device, dtype=torch.int32)
        fired.index_add_(0, indices.flatten(), active.flatten().int())
        return TrainOutput(
            recon=decode(values, indices, self.W_dec) + self.b_dec,
            penalty=values.new_zeros(()),
            l0=active.sum(dim=1, dtype=torch.float32).mean(),
            fired=fired > 0,
        )


class _ShardedTopK(Sharded, TopK):
    """The k largest of all processes' pre-activations."""

    def activate(self, pre_acts: Float[Tensor, "*batch H"]) -> Float[Tensor, "*batch H"]:
        return self._largest(pre_acts.flatten(0, -2), self.k).view_as(pre_acts)

    def training_forward(self, x: Float[Tensor, "N D"]) -> TrainOutput:
        pre = self.project(x)
        return self.train_output(pre, self.activate(pre))
