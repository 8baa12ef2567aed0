"""A folder has one run at a time; a second is refused and told of the first, and a dead one's claim is void."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from fluxsae.files.folder_lock import LOCK, FolderInUseError, FolderLock
from fluxsae.files.whole import write_text
from fluxsae.runtime.folder_lock import OneRunOnly

HOLD = (
    "import sys; from fluxsae.files import FolderLock; c = FolderLock(sys.argv[1]); print('mine', flush=True); input()"
)


@contextmanager
def other_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has claimed the folder."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "mine\n"
        yield holder


def test_a_second_claim_names_the_first_which_may_be_dead(tmp_path: Path) -> None:
    with other_process(tmp_path) as holder:
        with pytest.raises(FolderInUseError, match=rf"in use by process {holder.pid} on .* name another folder"):
            FolderLock(tmp_path)
        assert (tmp_path / LOCK).read_text().startswith(f"process {holder.pid} ")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    FolderLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_may_claim_a_folder_again(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path / "a"), FolderLock(tmp_path / "a")
    first.release()
    first.release()
    assert (tmp_path / "a" / LOCK).exists()
    second.release()
    assert not (tmp_path / "a").exists()  # as before


@pytest.mark.parametrize("released", [False, True])
def test_a_trainers_run_claims_its_folder(tmp_path: Path, released: bool) -> None:
    class Module(LightningModule):
        def predict_step(self, batch: Tensor) -> Tensor:
            assert (tmp_path / "out" / LOCK).exists()
            if not released:
                raise ValueError("stop")
            return batch

    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[OneRunOnly(tmp_path / "out")],
    )  # fmt: skip
    with nullcontext() if released else pytest.raises(ValueError, match="stop"):
        trainer.predict(Module(), [torch.zeros(1)])
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_claimed_folder_that_goes_stops_every_write(tmp_path: Path) -> None:
    claim = FolderLock(tmp_path / "drive")
    write_text(tmp_path / "before.txt", "")
    (tmp_path / "drive").rename(tmp_path / "elsewhere")
    (tmp_path / "drive").mkdir()
    with pytest.raises(OSError, match=r"Stale file handle: .*drive"):
        write_text(tmp_path / "after.txt", "")
    claim.release()
    assert not (tmp_path / "after.txt").exists() and (tmp_path / "elsewhere" / LOCK).exists()
    write_text(tmp_path / "after.txt", "")
