"""How fast a training is fed, in its progress bar, so that one sees whether the disk or the device bounds it."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from fluxsae.data.activations import ActivationData
from fluxsae.data.mixing.tokens import Feed


class Rates(NamedTuple):
    """Megabytes a second as stored, and the share of the time in which training did not wait for tokens."""

    read: float
    busy: float


class Throughput(Callback):
    """Adds `read=850 MB/s, busy=93 %` to the progress bar of a training on `ActivationData`, renewed every few steps.

    Busy is the share of the host's time outside its waits for a batch. Where steps run on a device, which the host
    does not wait for, the device is busy at least that much: it may still have work when the host waits.

    Args:
        every: seconds between renewals.
    """

    def __init__(self, every: float = 2.0) -> None:
        self.every = every
        self.rates: Rates | None = None
        self._since: tuple[float, int, float] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        bar: Any = trainer.progress_bar_callback
        if bar is None or _data(trainer) is None:
            return
        metrics = bar.get_metrics
        # Not by logging, which would put the numbers on the device and fetch them from there at every step.
        bar.get_metrics = lambda *arguments: {**metrics(*arguments), **self.shown()}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = None  # validation is no part of it

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        data = _data(trainer)
        if data is not None:
            self.note(data.feed, time.perf_counter())

    def note(self, feed: Feed, now: float) -> None:
        """Take the rates since the last time, when that is long enough ago."""
        if self._since is None:
            self._since = (now, feed.n_bytes, feed.waited)
            return
        then, n_bytes, waited = self._since
        if now - then >= self.every:
            seconds = now - then
            self.rates = Rates((feed.n_bytes - n_bytes) / 1e6 / seconds, 1 - (feed.waited - waited) / seconds)
            self._since = (now, feed.n_bytes, feed.waited)

    def shown(self) -> dict[str, str]:
        """What the progress bar adds."""
        if self.rates is None:
            return {}
        return {"read": f"{self.rates.read:.0f} MB/s", "busy": f"{self.rates.busy:.0%}".replace("%", " %")}


def _data(trainer: Trainer) -> ActivationData | None:
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, ActivationData) else None
