"""Joins what several processes have seen, through the Trainer's strategy. Legend: W processes."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch import Tensor


def gather(trainer: Trainer, tensor: Tensor) -> Tensor:
    """`tensor`, of one shape in every process, as [W, *shape] in each of them."""
    if trainer.world_size == 1:
        return tensor[None]
    gathered = trainer.strategy.all_gather(tensor.contiguous())
    assert isinstance(gathered, torch.Tensor)
    return gathered
