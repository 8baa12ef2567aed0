"""Every kind of SAE learns on a GPU as configured, and a fused step ends where autograd's does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from fluxsae.data.activations import ActivationData
from fluxsae.sae import L1, SAE, BatchTopK, JumpReLU, TopK
from fluxsae.training.module import SAETraining
from fluxsae.training.sweep import SweepTraining
from tests.synthetic import dictionary, token_shards

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

D_IN, N_FEATURES, N_STEPS = 64, 256, 300
KINDS: dict[str, Callable[[], SAE]] = {
    "TopK": lambda: TopK(D_IN, N_FEATURES, 8, seed=0),
    "TopK, dense": lambda: TopK(D_IN, N_FEATURES, 100, seed=0),
    "L1": lambda: L1(D_IN, N_FEATURES, 0.3, seed=0),
    "BatchTopK": lambda: BatchTopK(D_IN, N_FEATURES, 8, seed=0),
    "JumpReLU": lambda: JumpReLU(D_IN, N_FEATURES, 0.3, seed=0),
    "Matryoshka": lambda: BatchTopK(D_IN, N_FEATURES, 8, groups=[32, 256], seed=0),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    source = dictionary(D_IN, 128, active=6.0)
    return token_shards(folder, 64, 1, size=256, d_in=D_IN, images_per_shard=64, source=source).folder


def training(kind: str, folder: Path, fused: bool | None = None) -> SAETraining:
    return SAETraining(KINDS[kind](), folder / kind, lr=3e-3, dead_after=20_000, sparsity_warmup_steps=50, fused=fused)


def fit(module: LightningModule, shards: Path, **options: Any) -> dict[str, float]:
    trainer = Trainer(
        accelerator="gpu", devices=1, precision="bf16-mixed", max_steps=N_STEPS, num_sanity_val_steps=0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=ActivationData(shards, batch_size=1024, val_fraction=0.1, buffer_images=16))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_learns(kind: str, shards: Path, tmp_path: Path) -> None:
    assert fit(training(kind, tmp_path), shards)["val/fve"] > 0.5


@pytest.mark.parametrize("kind", ["TopK", "TopK, dense", "L1"])
def test_a_fused_training_ends_where_autograds_does(kind: str, shards: Path, tmp_path: Path) -> None:
    ours = fit(training(kind, tmp_path / "fused", fused=True), shards)
    theirs = fit(training(kind, tmp_path / "autograd", fused=False), shards)
    assert ours["val/fve"] == pytest.approx(theirs["val/fve"], abs=0.01)
    assert ours["val/l0"] == pytest.approx(theirs["val/l0"], rel=0.1)


def test_a_sweep_of_kinds_learns(shards: Path, tmp_path: Path) -> None:
    members = {name: training(name, tmp_path) for name in ("TopK", "L1", "BatchTopK")}
    found = fit(SweepTraining(members), shards)
    assert all(found[f"val/{name}/fve"] > 0.5 for name in members)
