"""Ctrl-C and SIGTERM end a command within seconds, and what it then says to type ends as if nothing had happened."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from tests.faults.kill import Host, Moment, Stage, host, make_stages, result, unbroken

SECONDS = 15
"""On a busy machine; on an idle one it is less than one."""


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    return make_stages(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with host(tmp_path_factory.mktemp("host")) as process:
        yield process


@pytest.mark.parametrize(
    ("name", "signum"),
    [
        ("capture", signal.SIGTERM),
        ("fit", signal.SIGINT),
        ("fit", signal.SIGTERM),
        ("scores", signal.SIGINT),
    ],
)
def test_an_interrupted_command_says_how_to_go_on(
    stages: dict[str, Stage], one: Host, tmp_path: Path, name: str, signum: signal.Signals
) -> None:
    stage = stages[name]
    reference = unbroken(one, stage, tmp_path / "unbroken")
    for part in (2, 4, 8):  # on a busy machine one run may take half of another's time, and be over
        folder = tmp_path / f"interrupted-{part}"
        folder.mkdir()
        config = folder.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(stage.config(folder)))
        one.log.write_text("")
        run = one.run([stage.verb, "-c", str(config)], Moment(folder, reference.seconds / part), signum)
        if run.code != 0:
            break
    assert run.code == 128 + signum, one.log.read_text()[-3000:]
    assert run.seconds < SECONDS
    said, command = one.log.read_text().split("; go on with:\n")
    assert said.rpartition("\n")[2].startswith(f"fluxsae: interrupted by {signum.name}"), said
    if " at step " in said:  # else it was caught while it measured, or before its first step
        last = folder / "checkpoints" / "last.ckpt"
        step = torch.load(last, weights_only=True)["global_step"]
        assert said.endswith(f" at step {step}, which {last} holds")
    assert not list(folder.rglob(".in-use"))
    arguments = shlex.split(command)
    assert arguments[0] == "fluxsae"
    assert one.run(arguments[1:]).code == 0, one.log.read_text()[-3000:]
    assert result(stage, folder) == reference.files


def test_slurms_requeue_signal_saves_between_steps_and_the_job_goes_on(
    stages: dict[str, Stage], one: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SLURM does it: SIGUSR1 some time before the job's end, then SIGTERM, then the same command in a new job."""
    reference = unbroken(one, stages["fit"], tmp_path / "unbroken").files
    programs, folder = tmp_path / "bin", tmp_path / "job"
    programs.mkdir()
    folder.mkdir()
    (programs / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path / 'requeued'}\n")
    (programs / "scontrol").chmod(0o755)
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(stages["fit"].config(folder)))
    job = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "JOB_NAME": "fit", "JOB_ID": "7", "LOCALID": "0", "PROCID": "0"}
    for name, value in (job | {"NODEID": "0"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    with host(tmp_path) as cluster:
        began = Moment(folder, 0.2)
        requeued = tmp_path / "requeued"
        cluster.run(["fit", "-c", str(config)], began, signal.SIGUSR1, then=lambda: requeued.exists())
        assert requeued.read_text() == "requeue 7\n", cluster.log.read_text()[-3000:]
        assert list(folder.glob("hpc_ckpt_*.ckpt"))
        assert cluster.run(["fit", "-c", str(config)]).code == 0, cluster.log.read_text()[-3000:]
    assert result(stages["fit"], folder) == reference
