"""Worlds of several processes leave one process's files, and end when one of them dies."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

import fluxsae.capture
from tests.faults.kill import Stage, make_stages
from tests.faults.processes import compare, config_for, start


class DyingCapture(fluxsae.capture.FluxCapture):
    """Its second process fails at its first batch, or is killed there."""

    how = "raises"

    def predict_step(self, batch: fluxsae.capture.RequestBatch, batch_idx: int = 0) -> int:
        if self.global_rank == 1:
            if self.how == "is killed":
                signal.raise_signal(signal.SIGKILL)
            raise ValueError("the second process ran out of luck")
        return super().predict_step(batch, batch_idx)


class KilledCapture(DyingCapture):
    how = "is killed"


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    return make_stages(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["capture", "scores"])
def test_three_processes_leave_one_processs_files(stages: dict[str, Stage], tmp_path: Path, name: str) -> None:
    outcomes = list(compare(stages, (name,), [(1, 0), (3, 0), (2, 2)], tmp_path))
    assert len(outcomes) == (2 if name == "capture" else 3)
    assert [each.failure for each in outcomes if each.failure] == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["DyingCapture", "KilledCapture"])
def test_a_process_that_dies_ends_the_others(stages: dict[str, Stage], tmp_path: Path, how: str) -> None:
    folder = tmp_path / "capture"
    config = config_for(stages["capture"], folder, 2, 0)
    config["model"]["class_path"] = f"tests.faults.test_processes.{how}"
    started = time.monotonic()
    done = start("predict", folder, config)
    assert done.returncode != 0 and time.monotonic() - started < 120
    if how == "DyingCapture":
        assert "the second process ran out of luck" in done.stderr
    assert not list(folder.rglob("metadata.json"))
    assert start("predict", folder, config_for(stages["capture"], folder, 1, 0)).returncode == 0
