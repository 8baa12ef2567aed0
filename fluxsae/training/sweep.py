"""Trains several SAEs, of other kinds, sizes or seeds, in one pass over the data.

Legend: N tokens, D width.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from fluxsae.data import ActivationData
from fluxsae.runtime import OneRunOnly, count_manual_step
from fluxsae.training.module import SAETraining, measure
from fluxsae.training.protocols import TrainedOnTokens

_ADVICE = "Using ModelCheckpoint with manual optimization"
"""Lightning warns that a checkpoint holds the weights after the step that it is named for; so it should."""


class SweepTraining(TrainedOnTokens):
    """Trains several SAEs on the same batches. Each has its own optimizer, dead features, folder and metrics.

    A member whose SAE has a `seed` ends with the weights that it would get alone on the same tokens. Without a seed,
    its initial weights depend on the members before it. Metrics carry the member's name: `train/NAME/fve`.

    Args:
        members: the trainings by name. Names consist of letters, digits, hyphens and underscores.
    """

    def __init__(self, members: dict[str, SAETraining]) -> None:
        super().__init__()
        _check(members)
        self.automatic_optimization = False  # which knows one optimizer only
        self.trainings = dict(members)
        self.members = torch.nn.ModuleDict(members)
        for name, member in members.items():
            member.join(name, self.log)

    @property
    def folder(self) -> Path:
        """The folder that those of all members are in, for what concerns the sweep as a whole."""
        return Path(os.path.commonpath([member.folder.parent for member in self.trainings.values()]))

    def configure_callbacks(self) -> list[Callback]:
        folders = [member.folder for member in self.trainings.values()]
        return [OneRunOnly(folder) for folder in folders] if self.trainer.training else []

    def setup(self, stage: str) -> None:
        warnings.filterwarnings("ignore", message=_ADVICE)
        for member in self.trainings.values():
            member.trainer = self.trainer
            member.setup(stage)

    def configure_model(self) -> None:
        """ValueError under ModelParallelStrategy, which spreads one SAE over processes."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "the strategy is ModelParallelStrategy, which no sweep takes; take ddp, or train SAEs one by one."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sweep"] = {name: {} for name in self.trainings}
        for name, member in self.trainings.items():
            member.on_save_checkpoint(checkpoint["sweep"][name])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """ValueError when the run to resume had other members, or another capture."""
        found = checkpoint.get("sweep", {})
        if set(found) != set(self.trainings):
            raise ValueError(
                f"the checkpoint is of a sweep over {', '.join(found) or 'nothing'} and the config names "
                f"{', '.join(self.trainings)}; name the same members, or start anew."
            )
        for name, member in self.trainings.items():
            member.on_load_checkpoint(found[name])

    def on_train_start(self) -> None:
        for member in self.trainings.values():
            member.on_train_start()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        for member in self.trainings.values():
            member.on_train_batch_start(batch, batch_idx)

    def training_step(self, batch: Float[Tensor, "N D"], batch_idx: int) -> None:
        losses = [member.training_step(batch, batch_idx) for member in self.trainings.values()]
        # One backward pass: members share no weight, and several processes wait for all gradients of each.
        by_autograd = [loss for loss in losses if loss.requires_grad]
        if by_autograd:
            self.manual_backward(torch.stack(by_autograd).sum())
        for member in self.trainings.values():
            member.update()
        count_manual_step(self.trainer)

    def on_validation_epoch_start(self) -> None:
        for member in self.trainings.values():
            member.on_validation_epoch_start()

    def validation_step(self, batch: Float[Tensor, "N D"], batch_idx: int) -> None:
        for member in self.trainings.values():
            member.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        for member in self.trainings.values():
            member.on_validation_epoch_end()

    def on_train_end(self) -> None:
        self._measure()
        for member in self.trainings.values():
            member.on_train_end()

    def on_fit_end(self) -> None:
        self._measure()
        for member in self.trainings.values():
            member.on_fit_end()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return [member.configure_optimizers() for member in self.trainings.values()]

    def _measure(self) -> None:
        stale = [member for member in self.trainings.values() if not member.measured]
        data = getattr(self.trainer, "datamodule", None)
        if stale and isinstance(data, ActivationData):
            measure(stale, data)


def _check(members: dict[str, SAETraining]) -> None:
    if not members:
        raise ValueError("a sweep has no members; name at least one SAETraining under `members`.")
    for name in members:
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(
                f"a sweep has a member called {name!r}; use letters, digits, hyphens and underscores only."
            )
    folders = [member.folder for member in members.values()]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(
                f"{folders.count(folder)} members of a sweep write to {folder}; give each a folder of its own."
            )
