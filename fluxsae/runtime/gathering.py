"""Joins what several processes have seen, through the Trainer's strategy. Legend: W processes."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor


def gather_tensors(trainer: Trainer, tensor: Tensor) -> Tensor:
    """`tensor`, of one shape in every process, as [W, *shape] in each of them."""
    if trainer.world_size == 1:
        return tensor[None]
    gathered = trainer.strategy.all_gather(tensor.contiguous())
    assert isinstance(gathered, torch.Tensor)
    return gathered


def gather_objects(trainer: Trainer, items: list[Any]) -> list[Any]:
    """The items of every process, in order of rank, in each of them."""
    if trainer.world_size == 1:
        return items
    parts: list[list[Any]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
