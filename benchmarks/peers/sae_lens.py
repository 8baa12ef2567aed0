"""SAELens: `TopKTrainingSAE` and `SAETrainer`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.peers.library import Batches, Library, Reconstruction, Task


class SAELens(Library):
    """Constant rate after warm-up, decay over the last fifth, as in its training tutorial; bf16 autocast.

    The tokens already have the norm that its `expected_average_only_in` would give them.
    """

    name = "SAELens"
    distribution = "sae-lens"

    @staticmethod
    def default_rate(n_features: int) -> float:
        return 3e-4

    def __init__(self, task: Task) -> None:
        from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig

        torch.manual_seed(task.seed)
        device = str(task.device)
        config = TopKTrainingSAEConfig(
            d_in=task.d_in,
            d_sae=task.n_features,
            k=task.k,
            device=device,
            aux_loss_coefficient=0.0 if task.plain else 1.0,
        )
        self.sae = TopKTrainingSAE(config)
        window = {"dead_feature_window": task.dead_after // task.batch_size} if task.dead_after else {}
        settings = SAETrainerConfig(
            total_training_samples=task.n_steps * task.batch_size,
            train_batch_size_samples=task.batch_size,
            lr=task.rate,
            lr_end=task.rate / 10,
            lr_warm_up_steps=task.share(0.05),
            lr_decay_steps=task.share(0.2),
            device=device,
            autocast=task.device.type == "cuda",
            **window,
        )
        self.trainer = SAETrainer(settings, self.sae, data_provider=iter(()))

    def train(self, batches: Batches) -> None:
        for batch in batches:
            self.trainer.step(batch)
            self.trainer.n_training_steps += 1  # which `step` leaves to its caller

    @torch.no_grad()
    def reconstruct(self, x: Float[Tensor, "N D"]) -> Reconstruction:
        codes = self.sae.encode(x)
        return Reconstruction(codes, self.sae.decode(codes))
