"""What a fused step needs to know beside the SAE."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Settings:
    """What the objective and Adam need to know, the dtype of products, and whether to record graphs."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_tokens: float = 10.0
    aux_k: int = 0
    aux_coef: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    graphs: bool = True
    fp8_encoder: bool = False
