"""What the progress bar says of the reading."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from fluxsae.data.activations import ActivationData
from fluxsae.data.mixing.tokens import Feed
from fluxsae.data.throughput import Throughput
from fluxsae.sae import TopK
from fluxsae.training.module import SAETraining
from tests.synthetic import token_shards


def test_rates_are_of_the_time_since_the_last_ones() -> None:
    callback, feed = Throughput(every=2.0), Feed()
    callback.note(feed, 10.0)
    feed.n_bytes, feed.waited = 500_000_000, 1.0
    callback.note(feed, 11.0)
    assert callback.shown() == {}
    feed.n_bytes, feed.waited = 3_400_000_000, 1.0
    callback.note(feed, 14.0)
    assert callback.shown() == {"read": "850 MB/s", "busy": "75 %"}
    feed.n_bytes += 2_000_000_000
    callback.note(feed, 16.0)
    assert callback.shown() == {"read": "1000 MB/s", "busy": "100 %"}


def test_the_progress_bar_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = token_shards(tmp_path / "tokens", 10, 2, size=32).folder
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[TQDMProgressBar(), Throughput(every=0.0)],
    )
    trainer.fit(SAETraining(TopK(16, 24, 4), tmp_path / "sae"), ActivationData(shards, batch_size=8))
    last = capsys.readouterr().out.rsplit("Epoch 1", 1)[-1]
    assert "read=" in last and " MB/s, busy=" in last
    assert trainer.progress_bar_metrics == {}
