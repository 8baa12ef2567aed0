"""Ctrl-C and SIGTERM end a run at once, a training at the end of its step, where it can go on.

A kill gives no such warning: for that, a training keeps a checkpoint as it goes.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from fluxsae.runtime.lightning_internals import (
    ask_nobody_for_sigterm,
    launched_processes,
    may_stop_early,
    stop_watching_processes,
)

PATIENCE = 5.0
"""Seconds that a process has to end by itself."""


class Interrupted(BaseException):
    """The process was asked to end, by the signal `signum`; what it says tells where."""

    def __init__(self, signum: int, where: str = "") -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}{where}")
        self.signum = signum


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside this context, SIGINT and SIGTERM raise `Interrupted` in the main thread.

    Python drops an exception that is raised while it destroys an object. A signal that arrives then is sent again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, _stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.unraisablehook

    def send_again(dropped: Any) -> None:
        if isinstance(dropped.exc_value, Interrupted):
            raising = (threading.main_thread().ident, dropped.exc_value.signum)
            threading.Timer(0.01, signal.pthread_kill, raising).start()
        else:
            hook(dropped)

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for signum, handler in before.items():
            signal.signal(signum, handler)


class StopsWhereItCanGoOn(Callback):
    """Within `interruptible`, makes a Trainer's run end so that it can go on.

    The training of one process first ends its step and saves it beside its other checkpoints, as `last`; a second
    signal ends it at once. SLURM's signal to save and be queued again acts between steps, too. Every other run raises
    `Interrupted` where it is, and ends the processes that it started.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._ours: dict[int, Any] = {}
        self._noted: list[int] = []
        self._trainer: Trainer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._give_back()  # what a check of validation before the training took
        self._take_over(trainer, self._note if trainer.world_size == 1 else self._stop_all)
        if signal.SIGTERM in self._before:
            ask_nobody_for_sigterm(trainer)  # Lightning's own handler is out of use now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_over(trainer, self._stop_all)

    on_test_start = on_predict_start = on_validation_start

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        while self._noted:
            signum = self._noted.pop(0)
            if signum in (signal.SIGINT, signal.SIGTERM):
                raise Interrupted(signum, _save(trainer))
            self._before[signum](signum, None)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        for signum in self._noted:
            if signum in (signal.SIGINT, signal.SIGTERM):
                raise Interrupted(signum, " while it measured on held-out prompts")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._give_back()
        if isinstance(exception, Interrupted):
            for process in launched_processes(trainer):
                _end(process)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._give_back()

    def _take_over(self, trainer: Trainer, handler: Any) -> None:
        """Only now, as Lightning has just put handlers of its own in place: they act at once, whatever a step does."""
        if self._before or signal.getsignal(signal.SIGINT) is not _stop:
            return
        self._trainer = trainer
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            if callable(signal.getsignal(signum)):
                self._ours[signum] = handler if signum != signal.SIGUSR1 else self._note
                self._before[signum] = signal.signal(signum, self._ours[signum])

    def _give_back(self) -> None:
        """What was there before; when all went well, Lightning has put back what was there before its own handlers."""
        for signum, handler in self._before.items():
            if signal.getsignal(signum) == self._ours[signum]:
                signal.signal(signum, handler)
        self._before, self._ours = {}, {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum in self._noted:
            self._stop_all(signum, frame)
        self._noted.append(signum)

    def _stop_all(self, signum: int, _: FrameType | None) -> None:
        launcher = self._trainer.strategy.launcher
        if launcher is not None:
            stop_watching_processes()
            launcher.kill(signal.SIGTERM)
        raise Interrupted(signum)


class LastCheckpoint(ModelCheckpoint):
    """Keeps one checkpoint of a running training, `last.ckpt`. `--ckpt_path last` continues from it.

    The checkpoint is written when `minutes` have passed since the one before, and when the training ends. The clock is
    checked at the end of each epoch and every `every_n_steps` steps. Lightning's own interval asks at every step, which
    makes several processes wait, and it does nothing in a sweep. A training that starts anew renames an existing
    `last.ckpt` to `earlier.ckpt`.

    Args:
        dirpath: the folder for the checkpoint. `fluxsae fit` uses `checkpoints` in the folder of the SAE. Elsewhere the
            default is `checkpoints` in the Trainer's `default_root_dir`.
        minutes: the most work that a kill may cost; 0 writes at every check.
        every_n_steps: number of steps between checks within an epoch.
    """

    def __init__(self, dirpath: str | Path | None = None, minutes: float = 5.0, every_n_steps: int = 50) -> None:
        if minutes < 0 or every_n_steps < 1:
            raise ValueError(
                f"minutes is {minutes} and every_n_steps is {every_n_steps}; they must be at least 0 and at least 1."
            )
        super().__init__(dirpath, save_last=True, save_top_k=0, every_n_epochs=0, enable_version_counter=False)
        self.minutes = minutes
        self.every_n_steps = every_n_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._settle(trainer)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at, self._saved_step = monotonic(), trainer.global_step
        if trainer.is_global_zero and trainer.global_step == 0 and not _tries_out(trainer) and _last(self).exists():
            # Killed before its first checkpoint, this run would otherwise go on from another's.
            _last(self).replace(_last(self).with_stem("earlier"))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        # A run goes on exactly from the end of a step: not from where Lightning ends an epoch, nor from the end of a
        # training that was stopped within one.
        if _stops(trainer):
            self._write(trainer)
        elif trainer.is_last_batch or trainer.global_step % self.every_n_steps == 0:
            self._look(trainer)

    def on_train_epoch_end(self, *_: Any) -> None:
        """Before 2.6, Lightning would write `last.ckpt` here, too: in the middle of a count, as above."""

    on_validation_end = on_train_epoch_end  # type: ignore[assignment]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        self._settle(trainer)  # Lightning looks for `last` before it sets callbacks up
        return super()._find_last_checkpoints(trainer)

    def _settle(self, trainer: Trainer) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")

    def _look(self, trainer: Trainer) -> None:
        if trainer.strategy.broadcast(monotonic() - self._saved_at >= 60 * self.minutes):
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if self._saved_step != trainer.global_step and not _tries_out(trainer):
            trainer.save_checkpoint(_last(self))
            self._saved_at, self._saved_step = monotonic(), trainer.global_step


def _last(checkpoints: ModelCheckpoint) -> Path:
    assert checkpoints.dirpath is not None
    return Path(checkpoints.dirpath) / f"{checkpoints.CHECKPOINT_NAME_LAST}{checkpoints.FILE_EXTENSION}"


def _stops(trainer: Trainer) -> bool:
    """Whether this step is the last for another reason than the number of epochs."""
    told = trainer.should_stop and may_stop_early(trainer)
    return told or trainer.global_step == trainer.max_steps


def _tries_out(trainer: Trainer) -> bool:
    """Whether this is a run of a few batches, after which everything is to be as before."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _stop(signum: int, _: FrameType | None) -> None:
    raise Interrupted(signum)


def _end(process: subprocess.Popen[bytes]) -> None:
    """One that waits for another process inside a library hears no signal: kill it after a while."""
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()


def _save(trainer: Trainer) -> str:
    """Save the step that has just ended; what to add to the message."""
    checkpoints = trainer.checkpoint_callback
    if not isinstance(checkpoints, ModelCheckpoint) or checkpoints.dirpath is None:
        return f" at step {trainer.global_step}, which no checkpoint was asked for"
    path = _last(checkpoints)
    trainer.save_checkpoint(path)
    return f" at step {trainer.global_step}, which {path} holds"
