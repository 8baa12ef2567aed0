"""Ctrl-C and SIGTERM end a command within seconds, and what it then says to type ends as if nothing had happened."""

from __future__ import annotations

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
    folder = tmp_path / "interrupted"
    folder.mkdir()
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(stage.config(folder)))
    one.log.write_text("")
    run = one.run([stage.verb, "-c", str(config)], Moment(folder, reference.seconds / 2), signum)
    assert run.code == 128 + signum, one.log.read_text()[-3000:]
    assert run.seconds < SECONDS
    said, command = one.log.read_text().split("; go on with:\n")
    assert said.rpartition("\n")[2].startswith(f"fluxsae: interrupted by {signum.name}"), said
    if name == "fit":
        last = folder / "checkpoints" / "last.ckpt"
        step = torch.load(last, weights_only=True)["global_step"]
        assert said.endswith(f" at step {step}, which {last} holds")
    assert not list(folder.rglob(".in-use"))
    arguments = shlex.split(command)
    assert arguments[0] == "fluxsae"
    assert one.run(arguments[1:]).code == 0, one.log.read_text()[-3000:]
    assert result(stage, folder) == reference.files
