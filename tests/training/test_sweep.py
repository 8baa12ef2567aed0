"""Several SAEs in one run: each as it would be alone."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from fluxsae.data.activations import ActivationData
from fluxsae.files.tables import read_csv
from fluxsae.runtime.interrupts import LastCheckpoint
from fluxsae.sae import L1, SAE, BatchTopK, JumpReLU, TopK, load_sae
from fluxsae.sae.checkpoint import read_config
from fluxsae.training.module import SAETraining
from fluxsae.training.sweep import SweepTraining
from tests.synthetic import dictionary, token_shards

D_IN = 16


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    token_shards(folder, 40, 3, size=128, d_in=D_IN, images_per_shard=32, source=dictionary(D_IN, 24, active=2.0))
    return folder


def members(folder: Path, **changes: Any) -> dict[str, SAETraining]:
    """Of other kinds, sizes and seeds, with settings that differ too; two restart their dead features."""
    saes: dict[str, tuple[SAE, dict[str, Any]]] = {
        "k4": (TopK(D_IN, 48, 4, seed=0), {}),
        "k4-seed1": (TopK(D_IN, 48, 4, seed=1), {"aux_k": 0, "resample_every": 11, "dead_after": 1000}),
        "wide": (BatchTopK(D_IN, 96, 4, groups=[24, 96], seed=0), {"betas": (0.8, 0.99)}),
        "jump": (JumpReLU(D_IN, 48, 0.5, seed=3), {"warmup_steps": 5, "resample_every": 7, "dead_after": 1000}),
        "l1": (L1(D_IN, 32, seed=0), {"lr": 2e-3, "aux_k": 0}),
    }
    settings: dict[str, Any] = {"lr": 5e-3, "warmup_steps": 10, "dead_after": 3000, "check_every": 5}
    return {
        name: SAETraining(sae, folder / name, **{**settings, **own, **changes}) for name, (sae, own) in saes.items()
    }


def fit(module: LightningModule, shards: Path, folder: Path, resume: Path | None = None, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": "callbacks" in changes,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 10,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    trainer = Trainer(**{**settings, **changes})
    stream = ActivationData(shards, batch_size=256, val_fraction=0.2)
    trainer.fit(module, datamodule=stream, ckpt_path=None if resume is None else str(resume))
    return trainer


def test_each_member_ends_as_it_would_alone(shards: Path, tmp_path: Path) -> None:
    together = fit(SweepTraining(members(tmp_path / "sweep")), shards, tmp_path)
    for name, training in members(tmp_path / "alone").items():
        alone = fit(training, shards, tmp_path)
        assert together.global_step == alone.global_step == 63
        ours, its = load_sae(tmp_path / "sweep" / name), load_sae(tmp_path / "alone" / name)
        for key, value in its.state_dict().items():
            assert torch.equal(ours.state_dict()[key], value), (name, key)
        assert read_config(tmp_path / "sweep" / name) == read_config(tmp_path / "alone" / name)


def test_the_data_are_read_once(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    loader = ActivationData.train_dataloader

    def counted(self: ActivationData) -> Any:
        asked.append(loader(self))
        return asked[-1]

    monkeypatch.setattr(ActivationData, "train_dataloader", counted)
    trainer = fit(SweepTraining(members(tmp_path)), shards, tmp_path)
    assert len(asked) == 1 and trainer.global_step == 3 * len(asked[0])


class StopAt(Callback):
    """Ends the run after so many steps, as a time limit would, or else as a kill would."""

    def __init__(self, step: int, kill: bool = False) -> None:
        self.step = step
        self.kill = kill

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step
        if trainer.should_stop and self.kill:
            raise RuntimeError("killed")


def kept(folder: Path, every: int) -> LastCheckpoint:
    return LastCheckpoint(folder, minutes=0.0, every_n_steps=every)


@pytest.mark.parametrize(("stop", "saved"), [(StopAt(30), 30), (StopAt(30, kill=True), 24)])
def test_a_resumed_sweep_ends_where_an_unbroken_one_does(
    shards: Path, tmp_path: Path, stop: StopAt, saved: int
) -> None:
    whole, broken, resumed = (SweepTraining(members(tmp_path / name)) for name in ("whole", "broken", "broken"))
    fit(whole, shards, tmp_path)
    with pytest.raises(RuntimeError, match="killed") if stop.kill else contextlib.nullcontext():
        fit(broken, shards, tmp_path, callbacks=[kept(tmp_path / "last", 8), stop])
    assert torch.load(tmp_path / "last/last.ckpt", weights_only=True)["global_step"] == saved
    fit(resumed, shards, tmp_path, tmp_path / "last/last.ckpt", callbacks=[kept(tmp_path / "last", 8)])
    assert resumed.global_step == whole.global_step
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_checkpoint_of_another_sweep_is_refused(shards: Path, tmp_path: Path) -> None:
    fit(SweepTraining(members(tmp_path)), shards, tmp_path, callbacks=[kept(tmp_path / "last", 8), StopAt(8)])
    fewer = members(tmp_path)
    del fewer["wide"]
    with pytest.raises(ValueError, match="of a sweep over k4, k4-seed1, wide, jump, l1 and the config names k4,"):
        fit(SweepTraining(fewer), shards, tmp_path, tmp_path / "last/last.ckpt")


def test_metrics_have_their_member_s_name(shards: Path, tmp_path: Path) -> None:
    fit(SweepTraining(members(tmp_path)), shards, tmp_path, logger=CSVLogger(tmp_path, name="csv", version=0))
    rows = read_csv(tmp_path / "csv" / "version_0" / "metrics.csv")
    for name in members(tmp_path):
        assert {f"train/{name}/fve", f"train/{name}/lr", f"val/{name}/fve", f"val/{name}/l0"} <= set(rows[0])
        values = [float(row[f"train/{name}/fve"]) for row in rows if row[f"train/{name}/fve"]]
        assert len(values) == 6 and values[-1] > values[0]
    first = next(row for row in rows if row["train/k4/loss"])
    assert first["train/k4/loss"] != first["train/k4-seed1/loss"]


def test_a_member_that_diverges_is_named_and_harms_no_other(shards: Path, tmp_path: Path) -> None:
    sweep = SweepTraining(members(tmp_path))

    class Spoil(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.global_step == 6:
                sweep.trainings["wide"].sae.W_dec.grad[3, 1] = float("nan")  # type: ignore[index]

    with pytest.raises(FloatingPointError, match="wide: the gradient of step 6 was NaN"):
        fit(sweep, shards, tmp_path, callbacks=[Spoil()])
    assert sweep.global_step == 10 and not (tmp_path / "wide").exists()
    bad = {name: member._making.updates_since_bad() for name, member in sweep.trainings.items()}
    assert bad == {**dict.fromkeys(sweep.trainings), "wide": 4}
    assert all(value.isfinite().all() for value in sweep.state_dict().values())


def test_spreading_a_sweep_over_processes_is_refused(tmp_path: Path) -> None:
    sweep = SweepTraining(members(tmp_path))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer._accelerator_connector.strategy = ModelParallelStrategy()
    sweep.trainer = trainer
    with pytest.raises(ValueError, match="take ddp, or train SAEs one by one"):
        sweep.configure_model()


def test_impossible_sweeps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no members"):
        SweepTraining({})
    with pytest.raises(ValueError, match="a member called 'a/b'; use letters"):
        SweepTraining({"a/b": members(tmp_path)["k4"]})
    twins = {name: SAETraining(TopK(D_IN, 48, 4), tmp_path / "same") for name in ("a", "b")}
    with pytest.raises(ValueError, match=r"2 members of a sweep write to .*same; give each a folder"):
        SweepTraining(twins)
