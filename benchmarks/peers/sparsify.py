"""EleutherAI's sparsify: `SparseCoder`, trained as its `Trainer` does, which itself takes language models only."""

from __future__ import annotations

import os
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.peers.library import Batches, Library, Reconstruction, Task, gao_rate


class Sparsify(Library):
    """Schedule-free sign gradient descent and no AuxK, its defaults; bf16 autocast in `forward`."""

    name = "sparsify"
    distribution = "eai-sparsify"
    factors = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)

    @staticmethod
    def default_rate(n_features: int) -> float:
        return 25 * gao_rate(n_features)

    def __init__(self, task: Task) -> None:
        if task.device.type != "cuda":
            os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # else its decoder runs on a GPU only
        from sparsify import SparseCoder, SparseCoderConfig

        torch.manual_seed(task.seed)
        self.task = task
        config = SparseCoderConfig(num_latents=task.n_features, k=task.k)
        self.sae = SparseCoder(task.d_in, config, device=task.device, dtype=torch.float32)
        self.optimizer: Any
        self.scheduler: Any
        self.optimizer, self.scheduler = self._adam() if task.plain else (self._signum(), None)
        self.since_fired = torch.zeros(task.n_features, dtype=torch.long, device=task.device)

    def train(self, batches: Batches) -> None:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")  # as its trainer does
        for step, batch in enumerate(batches):
            if step == 0:
                self.sae.b_dec.data = batch.mean(0)
            self._step(batch)
        torch.set_float32_matmul_precision(precision)

    @torch.no_grad()
    def reconstruct(self, x: Float[Tensor, "N D"]) -> Reconstruction:
        averaged = not self.task.plain
        if averaged:
            self.optimizer.eval()  # the averaged weights are the ones that count
        top = self.sae.encode(x)
        codes = x.new_zeros(len(x), self.task.n_features).scatter_(1, top.top_indices, top.top_acts)
        recon = self.sae.decode(top.top_acts, top.top_indices)
        if averaged:
            self.optimizer.train()
        return Reconstruction(codes, recon)

    def _step(self, batch: Tensor) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        dead = self.since_fired > self.task.dead_after if self.task.dead_after and not self.task.plain else None
        out = self.sae(batch, dead_mask=dead)
        (out.fvu + out.auxk_loss / 32).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        self.since_fired += len(batch)
        self.since_fired[out.latent_indices.flatten()] = 0

    def _adam(self) -> tuple[Any, Any]:
        from transformers import get_linear_schedule_with_warmup

        optimizer = torch.optim.Adam(self.sae.parameters(), lr=self.task.rate)
        return optimizer, get_linear_schedule_with_warmup(optimizer, self.task.share(0.05), self.task.n_steps)

    def _signum(self) -> Any:
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        optimizer = ScheduleFreeWrapper(SignSGD(self.sae.parameters(), lr=self.task.rate), momentum=0.95)
        optimizer.train()
        return optimizer
