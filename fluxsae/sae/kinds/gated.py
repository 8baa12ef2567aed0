"""Gated (Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders").

One set of directions answers two questions: is a feature active, and how strongly. So the penalty that keeps features
silent does not make the active ones smaller.
Legend: N tokens, D width, F features.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fluxsae.kernels.reference import decode, largest
from fluxsae.sae.base import SAE, ThresholdForm, TrainOutput
from fluxsae.sae.feature_rows import set_rows


class Gated(SAE):
    """A feature is active where its gate π = W_enc (x - b_dec) + b_enc is positive; its code is its magnitude.

    The magnitude is ReLU(exp(r) · W_enc (x - b_dec) + b_mag), with r and b_mag learned for each feature.

    The step of a gate has no useful derivative. So training adds two terms that reach gates (equation 7). One is `l1`
    times the mean over tokens of Σ ReLU(π). The other is the squared error of a reconstruction from ReLU(π), by a
    decoder that gets no gradient.

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
        self.log_gain = nn.Parameter(torch.zeros(n_features))
        self.b_mag = nn.Parameter(torch.zeros(n_features))

    @property
    def per_feature(self) -> list[nn.Parameter]:
        return [*super().per_feature, self.log_gain, self.b_mag]

    def options(self) -> dict[str, Any]:
        return {"l1": self.l1, **super().options()}

    def activate(self, pre_acts: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        return torch.where(pre_acts <= 0, 0.0, self.magnitudes(pre_acts))  # NaN stays NaN

    def magnitudes(self, pre_acts: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        """What codes are where gates are open."""
        return ((pre_acts - self.b_enc) * self.log_gain.exp() + self.b_mag).relu()

    def training_forward(self, x: Float[Tensor, "N D"]) -> TrainOutput:
        pre = self.project(x)
        by_gates = torch.addmm(self.b_dec.detach(), pre.relu(), self.W_dec.detach())
        return self.train_output(pre, self.activate(pre))._replace(auxiliary=(x - by_gates).square().sum(dim=1))

    def penalty(self, pre_acts: Float[Tensor, "N F"], codes: Float[Tensor, "N F"]) -> Float[Tensor, ""]:
        return self.l1 * pre_acts.relu().sum(dim=1).mean()

    def reconstruct_from(self, x: Float[Tensor, "N D"], features: Int[Tensor, "M"], k: int) -> Float[Tensor, "N D"]:
        gains = self.log_gain[features].exp()
        magnitudes = (x - self.b_dec.detach()) @ self.W_enc[features].T * gains + self.b_mag[features]
        indices = largest(magnitudes.detach(), k)
        return decode(magnitudes.gather(1, indices).relu(), indices, self.W_dec[features])

    @torch.no_grad()
    def restart(self, features: Int[Tensor, "M"], directions: Float[Tensor, "M D"], length: Float[Tensor, ""]) -> None:
        super().restart(features, directions, length)
        set_rows(self.log_gain, features, 0.0)
        set_rows(self.b_mag, features, 0.0)

    def threshold_form(self) -> ThresholdForm:
        """Magnitudes grow with gates, so a gate is open where its magnitude is above what it is at π = 0."""
        gain = self.log_gain.exp()
        at_zero = self.b_mag - gain * self.b_enc
        return ThresholdForm(gain[:, None] * self.W_enc, self.b_mag, at_zero.clamp_min(0.0))
