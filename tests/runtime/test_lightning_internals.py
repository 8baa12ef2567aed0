"""What is used of Lightning besides its public interface, each on a small Trainer: these fail when Lightning changes.

`scripts/test-lowest-lightning` runs them against the lowest version allowed, too.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import subprocess_script
from torch import Tensor
from torch.utils.data import DataLoader

from fluxsae.runtime import EpochPosition, close_resumed_epoch, count_manual_step, epoch_position
from fluxsae.runtime.lightning_internals import (
    ask_nobody_for_sigterm,
    launched_processes,
    may_stop_early,
    stop_watching_processes,
)

PACKAGE = Path(__file__).parents[2] / "fluxsae"
N_BATCHES = 3


class Line(LightningModule):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = (self.weight * batch).sum()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.weight], lr=0.1)


class Loader(DataLoader[Tensor]):
    """Three batches; it keeps its place, as the one of captured tokens does."""

    def __init__(self, trainer: Trainer, passes: list[EpochPosition]) -> None:
        super().__init__(torch.arange(6.0), batch_size=2)  # type: ignore[arg-type]
        self.trainer = trainer
        self.passes = passes
        self._skip = 0

    def __iter__(self) -> Any:
        self.passes.append(epoch_position(self.trainer))
        skip, self._skip = self._skip, 0
        return itertools.islice(super().__iter__(), skip, None)

    def state_dict(self) -> dict[str, int]:
        return {"batches": epoch_position(self.trainer).batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skip = state["batches"]


class Data(LightningDataModule):
    """Notes where the training is whenever a pass over the data begins."""

    def __init__(self, close: bool = True) -> None:
        super().__init__()
        self.close = close
        self.passes: list[EpochPosition] = []

    def train_dataloader(self) -> Loader:
        assert self.trainer is not None
        if self.close:
            close_resumed_epoch(self.trainer)
        return Loader(self.trainer, self.passes)


class Notes(Callback):
    """Notes something of the Trainer at the end of each step."""

    def __init__(self, see: Any) -> None:
        self.see = see
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(self.see(trainer))


class Log(Logger):
    """Notes the step of each log."""

    name = version = "log"

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int | None] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.steps.append(step)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class Saves(Callback):
    """Saves the end of one step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def small_trainer(*callbacks: Callback, **changes: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {"accelerator": "cpu", "max_epochs": 2, "enable_model_summary": False, **quiet}
    return Trainer(callbacks=list(callbacks), **{**settings, **changes})


def test_nothing_else_reaches_into_lightning() -> None:
    """The marks of it: the loops, and attributes of a Trainer, a strategy or a launcher that begin with `_`."""
    inner = re.compile(r"fit_loop|epoch_loop|(trainer|strategy|launcher)\._|child-process-observer|_broadcast_sigterm")
    found = {path.name for path in PACKAGE.rglob("*.py") if inner.search(path.read_text())}
    assert found == {"lightning_internals.py"}


def test_the_position_counts_batches_and_is_a_new_epochs_after_the_last() -> None:
    data, notes = Data(), Notes(epoch_position)
    small_trainer(notes).fit(Line(), data)
    assert notes.seen == [(0, 1), (0, 2), (0, 0), (1, 1), (1, 2), (1, 0)]
    assert [position.epoch for position in data.passes] == [0, 1]


@pytest.mark.parametrize("step", range(1, 3 * N_BATCHES))
def test_a_resumed_run_asks_for_each_epoch_once(tmp_path: Path, step: int) -> None:
    """From the end of any step but the last: within an epoch, and right after the last batch of one."""
    whole, resumed, notes, rest, log = Line(), Line(), Notes(epoch_position), Notes(epoch_position), Log()
    small_trainer(notes, Saves(tmp_path / "step.ckpt", step), max_epochs=3).fit(whole, Data())
    data, trainer = Data(), small_trainer(rest, max_epochs=3, logger=log, log_every_n_steps=1)
    trainer.fit(resumed, data, ckpt_path=str(tmp_path / "step.ckpt"))
    assert rest.seen == notes.seen[step:] and log.steps == list(range(step, 3 * N_BATCHES))
    assert [position.epoch for position in data.passes] == list(range(step // N_BATCHES, 3))
    assert torch.equal(whole.weight, resumed.weight)


def test_a_run_resumed_from_its_last_step_ends_at_once(tmp_path: Path) -> None:
    ends = Notes(lambda _: None)
    ends.on_train_end = lambda trainer, _: ends.seen.append(trainer.global_step)  # type: ignore[method-assign]
    small_trainer(Saves(tmp_path / "step.ckpt", 2 * N_BATCHES)).fit(Line(), Data())
    small_trainer(ends).fit(Line(), Data(), ckpt_path=str(tmp_path / "step.ckpt"))
    assert ends.seen == [2 * N_BATCHES]


def test_lightning_itself_asks_for_an_ended_epoch_again(tmp_path: Path) -> None:
    """Where it no longer does, `close_resumed_epoch` can go."""
    small_trainer(Saves(tmp_path / "step.ckpt", N_BATCHES), max_epochs=3).fit(Line(), Data())
    data = Data(close=False)
    small_trainer(max_epochs=3).fit(Line(), data, ckpt_path=str(tmp_path / "step.ckpt"))
    assert [position.epoch for position in data.passes] != [1, 2]


class ByHand(Line):
    """Two optimizers, stepped beside Lightning's count."""

    automatic_optimization = False  # type: ignore[assignment]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers(use_pl_optimizer=False):  # type: ignore[union-attr]
            optimizer.step()
        count_manual_step(self.trainer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([self.weight], lr=0.1), torch.optim.SGD([self.weight], lr=0.1)]


def test_a_manual_step_counts_once() -> None:
    notes = Notes(lambda trainer: trainer.global_step)
    small_trainer(notes, max_epochs=9, max_steps=5).fit(ByHand(), Data())
    assert notes.seen == [1, 2, 3, 4, 5]


def test_a_training_may_stop_once_it_has_its_least_steps() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = True

    notes = Notes(may_stop_early)
    small_trainer(Stop(), notes, min_steps=4, max_epochs=9).fit(Line(), Data())
    assert notes.seen == [False, False, False, True]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("silent", [True, False])
def test_no_step_asks_others_for_sigterm(monkeypatch: pytest.MonkeyPatch, silent: bool) -> None:
    class Silence(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if silent:
                ask_nobody_for_sigterm(trainer)

    asked: list[Tensor] = []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, **_: asked.append(tensor))
    one_of_two = SingleDeviceStrategy(torch.device("cpu"))
    one_of_two.world_size = 2
    small_trainer(Silence(), max_epochs=1, strategy=one_of_two).fit(Line(), Data())
    assert len(asked) == (0 if silent else N_BATCHES)


def test_the_processes_that_a_run_launched_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(subprocess_script, "_basic_subprocess_cmd", lambda: waits)
    monkeypatch.setattr(subprocess_script, "_launch_process_observer", lambda _: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the launcher puts more into it
    trainer = small_trainer(strategy="ddp", devices=3)
    launcher = trainer.strategy.launcher
    assert launcher is not None and launched_processes(trainer) == []
    assert launcher.launch(lambda: "ran") == "ran"
    launched = launched_processes(trainer)
    assert len(launched) == 2 and all(process.poll() is None for process in launched)
    launcher.kill(signal.SIGTERM)
    assert [process.wait(30) for process in launched] == [-signal.SIGTERM] * 2


def test_a_run_of_one_process_launched_none() -> None:
    assert launched_processes(small_trainer()) == []


@pytest.mark.parametrize("spared", [True, False])
def test_lightnings_observer_leaves_a_stopping_process_alone(spared: bool) -> None:
    """It kills the process that it works for, here a stand-in, when another has ended with a code."""
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"]) as ended:
        ended.wait()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stopping:
        observer = _ChildProcessObserver(stopping.pid, [ended], sleep_period=1)
        observer.start()
        if spared:
            stop_watching_processes()
        observer.join(30)
        assert not observer.is_alive()
        stopping.communicate(b"\n")
    assert stopping.returncode == (0 if spared else -signal.SIGKILL)
