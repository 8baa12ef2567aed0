"""What a fused step needs to know beside the SAE."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from fluxsae.training.steps.base import Objective


@dataclass(frozen=True)
class Settings(Objective):
    """The objective, what Adam needs to know, the dtype of products, and whether to record graphs."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    dtype: torch.dtype = torch.bfloat16
    graphs: bool = True
    fp8_encoder: bool = False

    @classmethod
    def of(cls, objective: Objective, betas: tuple[float, float], fp8_encoder: bool) -> Settings:
        return cls(**asdict(objective), betas=betas, fp8_encoder=fp8_encoder)
