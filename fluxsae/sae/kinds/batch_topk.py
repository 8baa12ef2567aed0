"""BatchTopK (Bussmann et al. 2024): as many features a token as it needs, k of them on average over a batch.

Legend: N tokens, D width, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fluxsae.sae.base import SAE, ThresholdForm, TrainOutput, checked_k

MEMORY = 0.99
"""Share of the threshold that a training step leaves as it is: it averages over about the last hundred steps."""


class BatchTopK(SAE):
    """In training the N·k largest pre-activations of a batch, where positive; in inference all above a threshold.

    The threshold is a running mean of the smallest pre-activation that training kept. So in inference the codes of a
    token do not depend on other tokens. Before the first step the threshold is 0, which keeps all that is positive.

    Args:
        d_in: width of a token.
        n_features: number of features.
        k: mean number of features kept for a token.
        groups: prefixes of a Matryoshka SAE, see `SAE`.
        seed: decides the initial weights, see `SAE`.
    """

    threshold: Tensor
    restart_gain: ClassVar[float] = 1.0  # as TopK's, and for its reasons

    def __init__(
        self, d_in: int, n_features: int, k: int, groups: list[int] | None = None, seed: int | None = None
    ) -> None:
        super().__init__(d_in, n_features, groups, seed, encoder_gain=0.1)
        self.k = checked_k(k, n_features)
        self.register_buffer("threshold", torch.zeros(()))

    @property
    def expected_l0(self) -> float:
        return float(self.k)

    def options(self) -> dict[str, Any]:
        return {"k": self.k, **super().options()}

    def threshold_form(self) -> ThresholdForm:
        return ThresholdForm(self.W_enc, self.b_enc, torch.zeros_like(self.b_enc) + self.threshold)

    def activate(self, pre_acts: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        return torch.where(pre_acts <= self.threshold, 0.0, pre_acts)  # NaN stays NaN

    def training_forward(self, x: Float[Tensor, "N D"]) -> TrainOutput:
        pre = self.project(x)
        flat = pre.flatten()
        indices = flat.detach().topk(self.k * len(pre), sorted=False).indices
        values = flat[indices].relu()
        codes = torch.zeros_like(flat).scatter(0, indices, values).view_as(pre)
        smallest = values.detach().float().masked_fill(values.detach() <= 0, torch.inf).amin()
        return self.train_output(pre, codes)._replace(cutoff=smallest)

    @torch.no_grad()
    def remember(self, run: TrainOutput, average: Callable[[Tensor], Tensor]) -> None:
        """Move the threshold towards this pass's cutoff; a pass that kept nothing, or no number, moves nothing."""
        assert run.cutoff is not None
        cutoff = average(run.cutoff).to(self.threshold.dtype)
        moved = torch.where(self.threshold > 0, self.threshold.lerp(cutoff, 1 - MEMORY), cutoff)
        self.threshold.copy_(torch.where(cutoff.isfinite(), moved, self.threshold))
