"""dictionary_learning: `AutoEncoderTopK` and `TopKTrainer`."""

from __future__ import annotations

import contextlib

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.peers.library import Batches, Library, Reconstruction, Task, gao_rate


class DictionaryLearning(Library):
    """Warm-up, and decay over the last fifth, as in its demonstration; tokens of mean square norm 1; bf16 autocast."""

    name = "dictionary_learning"
    distribution = "dictionary-learning"

    @staticmethod
    def default_rate(n_features: int) -> float:
        return gao_rate(n_features)

    def __init__(self, task: Task) -> None:
        from dictionary_learning.trainers import TopKTrainer

        self.task = task
        self.trainer = TopKTrainer(
            steps=task.n_steps,
            activation_dim=task.d_in,
            dict_size=task.n_features,
            k=task.k,
            layer=0,
            lm_name="",
            lr=task.rate,
            auxk_alpha=0.0 if task.plain else 1 / 32,
            warmup_steps=task.share(0.05),
            decay_start=task.share(0.8),
            seed=task.seed,
            device=str(task.device),
        )
        if task.dead_after:
            self.trainer.dead_feature_threshold = task.dead_after

    def train(self, batches: Batches) -> None:
        cuda = self.task.device.type == "cuda"
        for step, batch in enumerate(batches):
            x = batch / self.task.d_in**0.5
            with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
                self.trainer.update(step, x.bfloat16() if cuda else x)

    @torch.no_grad()
    def reconstruct(self, x: Float[Tensor, "N D"]) -> Reconstruction:
        norm = self.task.d_in**0.5
        codes = self.trainer.ae.encode(x / norm)
        return Reconstruction(codes, self.trainer.ae.decode(codes) * norm)
