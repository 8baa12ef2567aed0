"""Worlds of several processes leave one process's files, and end when one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import fluxsae.capture.module
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


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True], ids=["SIGTERM to the first", "Ctrl-C to all"])
def test_a_signal_ends_all_processes(stages: dict[str, Stage], tmp_path: Path, to_all: bool) -> None:
    """A scheduler tells the first process, a terminal tells all of them."""
    folder = tmp_path / "capture"
    config = config_for(stages["capture"], folder, 2, 0)
    config["data"]["init_args"]["repetitions"] = 5000
    path = tmp_path / "capture.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "fluxsae", "predict", "-c", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    while not list(folder.rglob("shard-*.tar")):
        assert child.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.1)
    signum = signal.SIGINT if to_all else signal.SIGTERM
    (os.killpg if to_all else os.kill)(child.pid, signum)
    assert child.wait(60) == 128 + signum, (tmp_path / "log").read_text()[-3000:]
    assert (tmp_path / "log").read_text().count("; go on with:") == 1
    deadline = time.monotonic() + 30
    while _group_lives(child.pid):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.1)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
