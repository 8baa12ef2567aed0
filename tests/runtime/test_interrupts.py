"""A signal in the middle of a step acts at its end, once the step is saved; a second one acts at once.

For a kill, checkpoints are written as time passes.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from fluxsae.data.activations import ActivationData
from fluxsae.runtime.interrupts import Interrupted, LastCheckpoint, StopsWhereItCanGoOn, interruptible
from fluxsae.sae import TopK
from fluxsae.training.module import SAETraining
from tests.synthetic import token_shards


class SignalAt(Callback):
    """Sends this process `n` signals at the start of a step."""

    def __init__(self, step: int, n: int, signum: signal.Signals) -> None:
        self.step, self.n, self.signum = step, n, signum

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            for _ in range(self.n):
                signal.raise_signal(self.signum)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("n_signals", [1, 2])
def test_a_step_is_ended_and_saved_unless_told_twice(tmp_path: Path, n_signals: int, signum: signal.Signals) -> None:
    data = ActivationData(token_shards(tmp_path / "tokens", 10, 2, size=32).folder, batch_size=12)
    last = tmp_path / "checkpoints" / "last.ckpt"
    before = signal.getsignal(signum)
    trainer = Trainer(
        accelerator="cpu", logger=False, max_epochs=9, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            StopsWhereItCanGoOn(), ModelCheckpoint(last.parent, save_top_k=0), SignalAt(5, n_signals, signum)
        ],
    )  # fmt: skip
    with pytest.raises(Interrupted) as stopped, interruptible():
        trainer.fit(SAETraining(TopK(16, 24, 4), tmp_path / "sae"), data)
    saved = f" at step 6, which {last} holds" if n_signals == 1 else ""
    assert str(stopped.value) == f"interrupted by {signum.name}{saved}" and stopped.value.signum == signum
    assert last.exists() == (n_signals == 1)
    if last.exists():
        assert torch.load(last, weights_only=True)["global_step"] == 6
    assert signal.getsignal(signum) == before


class SignalsAsItGoes:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_comes_while_an_object_is_destroyed_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    hook = sys.unraisablehook
    with pytest.raises(Interrupted, match="SIGTERM"), interruptible():
        destroyed = SignalsAsItGoes()
        del destroyed
        until = monotonic() + 30
        while monotonic() < until:
            sleep(0.001)
    assert "ignored" not in capsys.readouterr().err
    assert sys.unraisablehook is hook


class Saved(TorchCheckpointIO):
    """Knows the steps that were saved."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.steps.append(checkpoint["global_step"])
        super().save_checkpoint(checkpoint, path, storage_options)


class Clock(Callback):
    """A step takes a minute."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.seconds += 60


def fit(folder: Path, *callbacks: Callback, **changes: Any) -> None:
    data = ActivationData(token_shards(folder / "tokens", 10, 2, size=32).folder, batch_size=12)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, **changes})
    trainer.fit(SAETraining(TopK(16, 24, 4), folder / "sae"), data)


def test_a_checkpoint_is_written_where_minutes_have_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs of six steps: the clock is looked at after 5, 6, 10, 12, 15 and 18."""
    clock, saved = Clock(), Saved()
    monkeypatch.setattr("fluxsae.runtime.interrupts.monotonic", lambda: clock.seconds)
    fit(tmp_path, clock, LastCheckpoint(tmp_path, minutes=2.0, every_n_steps=5), max_epochs=3, plugins=[saved])
    assert saved.steps == [5, 10, 12, 15, 18]


def test_an_earlier_training_s_checkpoint_is_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    fit(tmp_path, LastCheckpoint(folder), max_epochs=2)
    fit(tmp_path, LastCheckpoint(folder), fast_dev_run=True)
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    fit(tmp_path, LastCheckpoint(folder), max_epochs=1)
    steps = {path.stem: torch.load(path, weights_only=True)["global_step"] for path in folder.iterdir()}
    assert steps["earlier"] == 2 * steps["last"]


def test_without_a_folder_of_its_own_it_takes_the_trainer_s(tmp_path: Path) -> None:
    """From the start, so that `last` is found there."""
    root = tmp_path / "root"
    fit(tmp_path, LastCheckpoint(), max_epochs=1, default_root_dir=root)
    assert [path.name for path in root.rglob("*.ckpt")] == ["last.ckpt"]
    callbacks = [LastCheckpoint()]
    again = Trainer(accelerator="cpu", logger=False, default_root_dir=root, callbacks=callbacks, max_epochs=1)
    assert again._checkpoint_connector._parse_ckpt_path(TrainerFn.FITTING, "last", None, True) == str(
        root / "checkpoints" / "last.ckpt"
    )


@pytest.mark.parametrize("settings", [{"minutes": -1.0}, {"every_n_steps": 0}])
def test_impossible_intervals_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"minutes is .* at least 0 and at least 1"):
        LastCheckpoint(tmp_path, **settings)
