"""The same trainings in one process or in several, for tests that compare what they end with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fluxsae.runtime.distributed import OneAllReduce, Processes
from fluxsae.runtime.interrupts import LastCheckpoint, StopsWhereItCanGoOn, interruptible
from fluxsae.sae import L1, SAE, TopK
from fluxsae.sae.kinds.jumprelu import JumpReLU
from fluxsae.training.module import SAETraining
from fluxsae.training.steps import choice
from fluxsae.training.steps.fused.settings import Settings
from tests.synthetic import dictionary, draw

D_IN, N_FEATURES, BATCH, N_STEPS, STOP = 16, 48, 64, 36, 24
FEW = 16
"""Tokens a batch for kernels in Triton's interpreter, which takes a tenth of a second to choose one token's codes."""
NEVER_FIRE = 10
"""Features that cannot fire until they are restarted: AuxK and resampling have something to do."""


class Slices(IterableDataset[Tensor]):
    """Batches that are the same in every process, and of each batch this process's share."""

    def __init__(self, processes: Processes, dtype: torch.dtype, size: int, lead: int) -> None:
        self.dtype = dtype
        self.size = size
        ends = [size * i // processes.n + (lead if 0 < i < processes.n else 0) for i in range(processes.n + 1)]
        self.share = slice(*ends[processes.rank : processes.rank + 2])

    def __iter__(self) -> Iterator[Tensor]:
        source, generator = dictionary(D_IN), torch.Generator().manual_seed(0)
        for _ in range(N_STEPS):
            yield draw(source, self.size, generator).to(self.dtype)[self.share]


class SlicedData(LightningDataModule):
    """Tokens for processes whose batches together are what one process sees; the first one's has `lead` more."""

    def __init__(self, size: int = BATCH, lead: int = 0) -> None:
        super().__init__()
        self.size = size
        self.lead = lead

    def train_dataloader(self) -> DataLoader[Tensor]:
        assert self.trainer is not None
        module = self.trainer.lightning_module
        assert isinstance(module, SAETraining)
        slices = Slices(Processes.of(self.trainer), module.sae.W_dec.dtype, self.size, self.lead)
        return DataLoader(slices, batch_size=None)

    val_dataloader = train_dataloader


class Collectives(Callback):
    """Writes how often processes talk to each other in one training step, by kind of operation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 9:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profiler.start()
        elif trainer.global_step == 10 and trainer.is_global_zero:
            self.profiler.stop()
            counts = {event.key: event.count for event in self.profiler.key_averages() if event.key.startswith("c10d")}
            self.path.write_text(json.dumps(counts))


class Stop(Callback):
    """Ends a training early, as a time limit would."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= STOP


def make(kind: str) -> tuple[SAE, dict[str, Any]]:
    """An SAE, and how it is trained."""
    torch.manual_seed(0)
    training = {"lr": 3e-3, "warmup_steps": 5, "sparsity_warmup_steps": 5, "dead_after": 400, "check_every": 4}
    saes = {
        "TopK": (TopK(D_IN, N_FEATURES, 4), {"aux_k": 6, "aux_coef": 0.5, "resample_every": 15}),
        "L1": (L1(D_IN, N_FEATURES, 0.5), {"aux_k": 0, "resample_every": 15}),
        "JumpReLU": (JumpReLU(D_IN, N_FEATURES, 0.1), {"aux_k": 6, "resample_every": 15}),
    }
    sae, options = saes[kind]
    with torch.no_grad():
        sae.b_enc[:NEVER_FIRE] = -100.0
    return sae, {**training, **options}


def sharing_tokens(compress: bool = False) -> dict[str, Any]:
    """Trainer arguments for two processes with batches of their own."""
    return {"devices": 2, "strategy": OneAllReduce(compress)}


def sharing_features(n_groups: int = 1) -> dict[str, Any]:
    """Trainer arguments for groups of two processes that train one SAE, each group with batches of its own."""
    strategy = ModelParallelStrategy(n_groups, 2, save_distributed_checkpoint=False)
    return {"devices": 2 * n_groups, "strategy": strategy}


def fit(
    kind: str,
    folder: Path,
    data: LightningDataModule,
    *callbacks: Callback,
    resume: bool = False,
    fused: bool | None = None,
    n_steps: int = N_STEPS,
    **options: Any,
) -> None:
    """Train an SAE into `folder`, in float64, so that rounding is small; `options` are the Trainer's.

    Where `fused` is said, in float32; true is by kernels in Triton's interpreter, which needs TRITON_INTERPRET.
    """
    sae, training = make(kind)
    dtype = torch.float64 if fused is None else torch.float32
    if fused is not None:
        training |= {"fused": fused, "dead_after": 25, "check_every": 2}
        with torch.no_grad():
            sae.b_enc[:NEVER_FIRE] = -0.5  # which AuxK can lift: in eight steps it moves their rows by 0.01
    if fused:
        choice.why_not_fused = lambda *_: None
        Settings.of = staticmethod(  # type: ignore[method-assign]
            lambda objective, betas, fp8_encoder: Settings(**asdict(objective), betas=betas, dtype=dtype)
        )
    last = LastCheckpoint(folder, minutes=0.0, every_n_steps=12)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = Trainer(
        accelerator="cpu", max_steps=n_steps, callbacks=[last, StopsWhereItCanGoOn(), *callbacks], **quiet, **options
    )
    module = SAETraining(sae, folder, **training).to(dtype)
    with interruptible():
        trainer.fit(module, datamodule=data, ckpt_path="last" if resume else None)
