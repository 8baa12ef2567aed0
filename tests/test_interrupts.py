"""A signal in the middle of a step acts at its end, once the step is saved; a second one acts at once."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from fluxsae.activations import ActivationData
from fluxsae.interrupts import Interrupted, StopsWhereItCanGoOn, interruptible
from fluxsae.sae import TopK
from fluxsae.training import SAETraining
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
