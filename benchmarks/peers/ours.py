"""fluxsae itself: `SAETraining` in a Lightning `Trainer`, as `fluxsae fit` runs it."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Trainer
from torch import Tensor

from benchmarks.peers.library import Batches, Library, Reconstruction, Task, gao_rate
from fluxsae.sae import TopK
from fluxsae.training.module import SAETraining


class Ours(Library):
    name = "fluxsae"
    distribution = "fluxsae"

    @staticmethod
    def default_rate(n_features: int) -> float:
        return gao_rate(n_features)

    def __init__(self, task: Task) -> None:
        torch.manual_seed(task.seed)
        self.task = task
        self.sae = TopK(task.d_in, task.n_features, task.k).to(task.device)
        self.training: SAETraining | None = None

    def train(self, batches: Batches) -> None:
        task = self.task
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice on loaders and validation, which the benchmark has not
            self.training = SAETraining(self.sae, Path(folder), lr=task.rate, **recipe(task))
            trainer = Trainer(
                accelerator="gpu" if task.device.type == "cuda" else "cpu",
                devices=1,
                precision="bf16-mixed" if task.device.type == "cuda" else "32-true",
                max_steps=task.n_steps,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(self.training, batches)
        self.training = None
        self.sae.to(task.device)  # where a Trainer ends, the module is back on the CPU

    @torch.no_grad()
    def reconstruct(self, x: Float[Tensor, "N D"]) -> Reconstruction:
        if self.training is not None:
            self.training.synchronize_weights()
        codes = self.sae.encode(x)
        return Reconstruction(codes, self.sae.decode(codes))


def recipe(task: Task) -> dict[str, Any]:
    """What differs from `SAETraining`'s defaults: these runs are short.

    A rate that falls for most of the run leaves features that it killed the time to come back, and lifting those that
    were silent for one batch, a little at a time, brings them.
    """
    return {
        "warmup_steps": task.share(0.05),
        "decay_fraction": 0.6,
        "betas": (0.9, 0.99),
        "aux_k": 0,
        "dead_bias_increment": 0.0 if task.plain else 0.005,
        "dead_after": task.dead_after or task.batch_size,
    }
