"""What a training logs: numbers of a step, and of the held-out tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from fluxsae.sae import SAE, Metrics, whole

VALIDATION = ("fve", "mse", "l0", "dead_fraction")
"""The metrics of held-out tokens that are logged."""


class TrainingLog:
    """Logs under `train/` and `val/`, and for a sweep's member under its name there.

    Args:
        log: the `log` of the module that the Trainer runs.
        member: the name in a sweep; by default none.
    """

    def __init__(self, log: Callable[..., None], member: str = "") -> None:
        self._log = log
        self.member = member

    def key(self, part: str, name: str) -> str:
        return "/".join(filter(None, (part, self.member, name)))

    def step(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._log(self.key("train", name), value.clone())  # a fused step writes to the same place again

    def validation(self, metrics: Metrics) -> None:
        # Not in the progress bar, whose line they would break. They are sums over processes already, the same in each.
        for name in VALIDATION:
            self._log(self.key("val", name), getattr(metrics, name), sync_dist=True)

    def histograms(self, loggers: Iterable[Any], sae: SAE, metrics: Metrics, step: int) -> None:
        """Densities of the features and lengths of the weights' rows, to TensorBoard."""
        values = {
            "log10_density": metrics.density.clamp_min(1e-6).log10(),
            "decoder_norm": whole(sae.W_dec.norm(dim=1)),
            "encoder_norm": whole(sae.W_enc.norm(dim=1)),
        }
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, value in values.items():
                    logger.experiment.add_histogram(self.key("val", name), value, step)


def at(value: float, device: torch.device) -> Tensor:
    """A number on the device: Lightning would wait for the device to take a float there."""
    return torch.full((), value, device=device)
