"""Muon for the matrices inside blocks, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Steps `hidden` by Muon (Jordan et al. 2024), its updates scaled to AdamW's size, and `others` by AdamW."""

    def __init__(self, hidden: list[nn.Parameter], others: list[nn.Parameter], lr: float, muon_lr: float) -> None:
        super().__init__([*hidden, *others], {"lr": lr})
        common: dict[str, Any] = {"weight_decay": 0.01}
        self._parts = (
            torch.optim.Muon(hidden, lr=muon_lr, momentum=0.95, adjust_lr_fn="match_rms_adamw", **common),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), fused=True, **common),
        )
        self._share_groups()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()

    def _share_groups(self) -> None:
        """Schedules and gradient clipping look at `param_groups`."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]
