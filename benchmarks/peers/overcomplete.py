"""Overcomplete: `TopKSAE` and `train_sae`."""

from __future__ import annotations

from typing import Any
from unittest import mock

import matplotlib
import matplotlib.pyplot
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.peers.library import Batches, Library, Reconstruction, Task


class Overcomplete(Library):
    """Adam with a cosine schedule and its AuxK-like loss; fp16 autocast on a GPU."""

    name = "Overcomplete"
    distribution = "overcomplete"
    factors = (8, 16, 32, 64, 128)

    @staticmethod
    def default_rate(n_features: int) -> float:
        return 5e-4

    def __init__(self, task: Task) -> None:
        library = _library()
        torch.manual_seed(task.seed)
        self.task = task
        self.sae = library.TopKSAE(task.d_in, nb_concepts=task.n_features, top_k=task.k, device=str(task.device))

    def train(self, batches: Batches) -> None:
        library, task = _library(), self.task
        from overcomplete.sae.losses import top_k_auxiliary_loss
        from overcomplete.sae.train import train_sae_amp

        optimizer = torch.optim.Adam(self.sae.parameters(), lr=task.rate)
        schedule = library.CosineScheduler(optimizer, task.rate, task.rate / 100, task.n_steps, task.share(0.05))
        train, device = (train_sae_amp, "cuda") if task.device.type == "cuda" else (library.train_sae, "cpu")
        loss = squared_error if task.plain else top_k_auxiliary_loss
        train(self.sae, batches, loss, optimizer, schedule, nb_epochs=1, monitoring=0, device=device)

    @torch.no_grad()
    def reconstruct(self, x: Float[Tensor, "N D"]) -> Reconstruction:
        was_training = self.sae.training
        self.sae.eval()
        _, codes = self.sae.encode(x)
        recon = self.sae.decode(codes)
        self.sae.train(was_training)
        return Reconstruction(codes, recon)


def squared_error(x: Tensor, x_hat: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
    """The criterion of its README."""
    return (x - x_hat).square().mean()


def _library() -> Any:
    # Overcomplete 0.3.0 asks, while it is imported, for a function that matplotlib 3.11 no longer has.
    with mock.patch.object(matplotlib.cm, "get_cmap", matplotlib.pyplot.get_cmap, create=True):
        from overcomplete import sae
    return sae
