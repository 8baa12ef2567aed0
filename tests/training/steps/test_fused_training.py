"""A Trainer's run by fused steps beside one by autograd's. Where there is no GPU, Triton's interpreter stands in."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

pytest.importorskip("triton")

import fluxsae.training.module
from fluxsae.data.activations import ActivationData
from fluxsae.kernels import columns
from fluxsae.runtime.interrupts import LastCheckpoint
from fluxsae.sae import L1, SAE, BatchTopK, TopK
from fluxsae.training.module import SAETraining
from fluxsae.training.steps.fused.settings import Settings
from fluxsae.training.steps.fused.step import why_not_fused
from tests.synthetic import dictionary, token_shards

D_IN, N_STEPS = 8, 6
MAKE = {"TopK": lambda: TopK(D_IN, 10, 2, seed=1), "L1": lambda: L1(D_IN, 10, 0.3, seed=1)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    token_shards(folder, 12, 1, size=32, d_in=D_IN, images_per_shard=12, source=dictionary(D_IN, 12, active=2.0))
    return folder


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused steps anywhere, in a precision in which they can be compared."""
    monkeypatch.setattr(fluxsae.training.module, "why_not_fused", lambda *_: None)
    monkeypatch.setattr(fluxsae.training.module, "Settings", partial(Settings, dtype=torch.float32, graphs=False))


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def fit(
    shards: Path,
    folder: Path,
    sae: SAE,
    fused: bool | None,
    *callbacks: Callback,
    resume: str | None = None,
    fp8_encoder: bool = False,
) -> SAE:
    how = {"dead_after": 20, "check_every": 2, "fused": fused, "fp8_encoder": fp8_encoder}
    module = SAETraining(sae, folder, lr=0.01, warmup_steps=2, **how)
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        max_steps=N_STEPS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[LastCheckpoint(folder, minutes=0.0, every_n_steps=2), *callbacks],
    )
    data = ActivationData(shards, batch_size=8, val_fraction=0.3)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    assert trainer.callback_metrics["train/fve"] > -10
    return sae.cpu()


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.usefixtures("in_float32")
def test_a_run_ends_where_autograds_does(shards: Path, tmp_path: Path, kind: str) -> None:
    ours = fit(shards, tmp_path / "fused", MAKE[kind](), True)
    theirs = fit(shards, tmp_path / "plain", MAKE[kind](), False)
    for (name, value), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(value, other, atol=1e-4), name
    assert torch.allclose(ours.W_dec.norm(dim=1), torch.ones(10), atol=1e-6)


@pytest.mark.usefixtures("in_float32")
def test_a_resumed_run_ends_where_an_unbroken_one_does(shards: Path, tmp_path: Path) -> None:
    whole = fit(shards, tmp_path / "whole", MAKE["TopK"](), True)
    fit(shards, tmp_path / "broken", MAKE["TopK"](), True, StopAt(4))
    resumed = fit(shards, tmp_path / "broken", MAKE["TopK"](), True, resume="last")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


class Spoils(Callback):
    """Puts a NaN among the tokens of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            batch[3, 2] = torch.nan


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("kind", MAKE)
def test_the_step_that_was_not_finite_is_named(shards: Path, tmp_path: Path, kind: str) -> None:
    for step in (1, 4):
        with pytest.raises(FloatingPointError, match=f"gradient of step {step} was NaN"):
            fit(shards, tmp_path / str(step), MAKE[kind](), True, Spoils(step))


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("kind", MAKE)
def test_where_kernels_are_wrong_autograd_goes_on(
    shards: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = fit(shards, tmp_path / "plain", MAKE[kind](), False)
    monkeypatch.setattr(columns, "weigh", lambda rows, _: rows.mul_(3))
    ours = fit(shards, tmp_path / "fused", MAKE[kind](), None)
    assert "training goes on by autograd, since the loss is 2" in caplog.text
    for (name, value), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(value, other, atol=1e-6), name
    with pytest.raises(RuntimeError, match=r"fused is true, but the loss is 2.% off autograd"):
        fit(shards, tmp_path / "asked", MAKE[kind](), True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fused is true, but there is no NVIDIA GPU; leave fused out"):
        fit(shards, tmp_path, MAKE["TopK"](), True)
    with pytest.raises(ValueError, match="fp8_encoder is true, but there is no NVIDIA GPU; leave fp8_encoder out"):
        fit(shards, tmp_path, MAKE["TopK"](), None, fp8_encoder=True)


def test_an_fp8_encoder_without_fused_steps_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fp8_encoder is true, but fused is false"):
        fit(shards, tmp_path, MAKE["TopK"](), False, fp8_encoder=True)


@pytest.mark.parametrize(
    ("sae", "obstacle"),
    [
        (TopK(8, 16, 2, groups=[4, 16]), "its features are in groups"),
        (BatchTopK(8, 16, 2), "it is a BatchTopK and only L1 and TopK have one"),
    ],
)
def test_kinds_without_one_are_named(sae: SAE, obstacle: str) -> None:
    assert why_not_fused(sae, Trainer(logger=False, accelerator="cpu")) == obstacle
