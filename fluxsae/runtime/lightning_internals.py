"""All that fluxsae reads or changes in Lightning besides its public interface.

Lightning may change any of it in any release. So it is in this file alone, and a test of each runs against the lowest
and the newest version that pyproject.toml allows.
"""

from __future__ import annotations

import subprocess
import threading
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher


class EpochPosition(NamedTuple):
    """How far a training is: the epoch, and the batches of it that are done; 0 behind the last of them."""

    epoch: int
    batches: int


def epoch_position(trainer: Trainer) -> EpochPosition:
    """Where a training is. A loader is asked for its state behind a step that Lightning has not counted to the end."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    return EpochPosition(trainer.current_epoch, 0 if batches.is_last_batch else batches.current.processed)


def close_resumed_epoch(trainer: Trainer) -> None:
    """End the epoch of a run that is resumed from a checkpoint of right after its last batch, unless it was the last.

    Lightning would ask for the next epoch's tokens while it still counts this one, and then begin one too few.
    """
    loop = trainer.fit_loop
    batches: Any = loop.epoch_loop.batch_progress
    epochs: Any = loop.epoch_progress
    ended = batches.is_last_batch and batches.total.completed == batches.total.processed - 1
    if not (loop.restarting and ended) or epochs.current.processed + 1 == loop.max_epochs:
        return
    batches.increment_completed()
    batches.reset_on_run()
    loop.epoch_loop._batches_that_stepped += 1
    epochs.increment_processed()
    epochs.increment_completed()


def count_manual_step(trainer: Trainer) -> None:
    """Count one step of a module that steps several optimizers by itself.

    Lightning would count the steps of every optimizer; a step of the run is one of each.
    """
    steps = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    steps.increment_ready()
    steps.increment_completed()


def may_stop_early(trainer: Trainer) -> bool:
    """Whether the training has had the epochs and steps that it must have, so that `should_stop` ends it."""
    return trainer.fit_loop._can_stop_early


def ask_nobody_for_sigterm(trainer: Trainer) -> None:
    """Spare each step the question whether the first process heard SIGTERM.

    Lightning has all processes ask before every step, and wait for the device to answer. It asks for what its own
    handler of the signal noted, so that handler must be out of use.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]


def launched_processes(trainer: Trainer) -> list[subprocess.Popen[bytes]]:
    """The other processes of a run that this one started."""
    launcher = trainer.strategy.launcher
    return list(launcher.procs) if isinstance(launcher, _SubprocessScriptLauncher) else []


def stop_watching_processes() -> None:
    """From here on the processes that Lightning started are ended by us.

    Every five seconds Lightning looks whether one of them has ended with a code. If so it kills all, this one in the
    middle of what it saves.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]


def _nothing() -> None:
    pass
