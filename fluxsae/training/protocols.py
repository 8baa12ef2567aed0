"""What Lightning and a sweep ask of a training, besides to train.

Legend: N tokens, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor

from fluxsae.training.training_log import TrainingLog


class TrainedOnTokens(LightningModule):
    """A training that tests as it validates: on the held-out tokens."""

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: Float[Tensor, "N D"], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()


class SweepMember(LightningModule):
    """A training that can be one of several in a sweep, which logs and steps for it.

    Lightning lets only the module that it runs log, and knows the optimizers of that module alone.
    """

    records: TrainingLog
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def join(self, name: str, log: Callable[..., None]) -> None:
        """Become the member `name` of a sweep, whose `log` this is."""
        self.records = TrainingLog(log, name)

    def update(self) -> None:
        """One step of the optimizer and its schedule, as a Trainer makes it."""
        self.on_before_optimizer_step(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after_optimizer_step()
        self.schedule.step()

    @abstractmethod
    def after_optimizer_step(self) -> None:
        """What is noted once the optimizer has stepped."""
