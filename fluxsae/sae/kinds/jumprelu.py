"""JumpReLU (Rajamanoharan et al. 2024): a learned threshold a feature, and a penalty on how many features are active.

Neither the jump nor the count has a useful derivative, so thresholds learn from straight-through estimators: the
derivatives of both, smoothed by a rectangle of width ε around the threshold.
Legend: N tokens, D width, F features, θ thresholds, ε bandwidth.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fluxsae.sae.base import SAE, ThresholdForm, TrainOutput
from fluxsae.sae.feature_rows import set_rows
from fluxsae.sae.sharding import Sharded


class JumpReLU(SAE):
    """Each feature has a learned threshold. A pre-activation above it is a code; all others are 0.

    Training adds a penalty on L0, the mean number of codes for a token: `l0` · L0, or `l0` · (L0 / target_l0 - 1)²
    with `target_l0`.

    Args:
        d_in: width of a token.
        n_features: number of features.
        l0: weight of the penalty, beside a squared error summed over channels of normalised tokens.
        target_l0: the L0 to aim for; by default fewer codes are always better.
        threshold: initial value of the thresholds. Pre-activations have a standard deviation of about 1 at first.
        bandwidth: ε. Only pre-activations within ε/2 of a threshold move it. A wider one learns faster but less
            exactly.
        groups: prefixes of a Matryoshka SAE, see `SAE`.
        seed: decides the initial weights, see `SAE`.
    """

    def __init__(
        self,
        d_in: int,
        n_features: int,
        l0: float = 1.0,
        target_l0: float | None = None,
        threshold: float = 0.5,
        bandwidth: float = 0.5,
        groups: list[int] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(d_in, n_features, groups, seed)
        if threshold <= 0 or bandwidth <= 0:
            raise ValueError(f"threshold is {threshold} and bandwidth {bandwidth}, expected both to be above 0.")
        if target_l0 is not None and not 0 < target_l0 <= n_features:
            raise ValueError(f"target_l0 is {target_l0}, expected above 0 and at most n_features = {n_features}.")
        self.l0 = l0
        self.target_l0 = target_l0
        self.initial = threshold
        self.bandwidth = bandwidth
        self.log_threshold = nn.Parameter(torch.full((n_features,), math.log(threshold)))  # so that θ stays positive

    @property
    def threshold(self) -> Float[Tensor, "F"]:
        """θ, with gradients to its logarithm."""
        return self.log_threshold.exp()

    @property
    def per_feature(self) -> list[nn.Parameter]:
        return [*super().per_feature, self.log_threshold]

    def options(self) -> dict[str, Any]:
        ours = {"l0": self.l0, "target_l0": self.target_l0, "threshold": self.initial, "bandwidth": self.bandwidth}
        return {**ours, **super().options()}

    def threshold_form(self) -> ThresholdForm:
        return ThresholdForm(self.W_enc, self.b_enc, self.threshold)

    def sharded_form(self) -> type[SAE] | None:
        return _ShardedJumpReLU if self.target_l0 is None else None  # a target ties all features together

    def activate(self, pre_acts: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        return torch.where(pre_acts <= self.threshold, 0.0, pre_acts)  # NaN stays NaN

    def training_forward(self, x: Float[Tensor, "N D"]) -> TrainOutput:
        pre = self.project(x)
        return self.train_output(pre, jump(pre, self.threshold, self.bandwidth))

    def penalty(self, pre_acts: Float[Tensor, "N F"], codes: Float[Tensor, "N F"]) -> Float[Tensor, ""]:
        l0 = step(pre_acts, self.threshold, self.bandwidth).sum(dim=1).mean()
        return self.l0 * (l0 if self.target_l0 is None else (l0 / self.target_l0 - 1).square())

    @torch.no_grad()
    def restart(self, features: Int[Tensor, "M"], directions: Float[Tensor, "M D"], length: Float[Tensor, ""]) -> None:
        super().restart(features, directions, length)
        set_rows(self.log_threshold, features, math.log(self.initial))


class _ShardedJumpReLU(Sharded, JumpReLU):
    """JumpReLU, whose features have their thresholds for themselves."""


def jump(pre_acts: Float[Tensor, "N F"], threshold: Float[Tensor, "F"], bandwidth: float) -> Float[Tensor, "N F"]:
    """z where z > θ, else 0. Its derivative by θ is taken to be -θ/ε where |z - θ| < ε/2, else 0."""
    codes: Tensor = _Jump.apply(pre_acts, threshold, bandwidth)
    return codes


def step(pre_acts: Float[Tensor, "N F"], threshold: Float[Tensor, "F"], bandwidth: float) -> Float[Tensor, "N F"]:
    """1 where z > θ, else 0. Its derivative by θ is taken to be -1/ε where |z - θ| < ε/2, else 0."""
    active: Tensor = _Step.apply(pre_acts, threshold, bandwidth)
    return active


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre_acts <= threshold, 0.0, pre_acts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        pre_acts, threshold = ctx.saved_tensors
        (gradient,) = gradients
        near = _near(pre_acts, threshold, ctx.bandwidth)
        for_threshold = -threshold / ctx.bandwidth * torch.where(near, gradient, 0.0).sum(dim=0)
        return torch.where(pre_acts > threshold, gradient, 0.0), for_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return (pre_acts > threshold).to(threshold.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        pre_acts, threshold = ctx.saved_tensors
        (gradient,) = gradients
        near = _near(pre_acts, threshold, ctx.bandwidth)
        return None, -torch.where(near, gradient, 0.0).sum(dim=0) / ctx.bandwidth, None


def _near(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return (pre_acts - threshold).abs() < bandwidth / 2
