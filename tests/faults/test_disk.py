"""A disk that is full, read-only or gone ends a command in one sentence, and once it is back the command goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from fluxsae.files.folder_lock import LOCK
from tests.faults.kill import Host, Stage, host, make_stages, result, unbroken

NAMES = ["capture", "fit", "scores"]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    return make_stages(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with host(tmp_path_factory.mktemp("host")) as process:
        yield process


def mount(*arguments: str | Path) -> bool:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode == 0


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A disk of `size` bytes at `folder`."""
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder):
        pytest.skip("only root may mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def run(one: Host, stage: Stage, folder: Path, *more: str) -> tuple[int | None, str]:
    """The exit code of a stage and the last line that it said."""
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(stage.config(folder)))
    one.log.write_text("")
    code = one.run([stage.verb, "-c", str(config), *more]).code
    said = one.log.read_text()
    assert "Traceback" not in said, said
    return code, (said.strip().splitlines() or [""])[-1]


def visible(files: dict[str, bytes], stage: Stage) -> dict[str, bytes]:
    return {
        name: data for name, data in files.items() if not Path(name).name.startswith(".") and stage.named(Path(name))
    }


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk(stages: dict[str, Stage], one: Host, tmp_path: Path, name: str, share: float) -> None:
    stage = stages[name]
    reference = unbroken(one, stage, tmp_path / "unbroken").files
    everything = [path for path in (tmp_path / "unbroken").rglob("*") if path.is_file()]
    pages = sum(-(-path.stat().st_size // 4096) for path in everything)
    with small_disk(tmp_path / "small", 4096 * max(1, round(share * pages))):
        code, said = run(one, stage, tmp_path / "small")
        assert (code, said.startswith("fluxsae: there is no room left for ")) == (2, True), said
        found = visible(result(stage, tmp_path / "small"), stage)
        assert found.items() <= reference.items()
        assert mount("-o", "remount,size=64m", tmp_path / "small")
        code, said = run(one, stage, tmp_path / "small", *stage.again)
        assert code == 0, said
        assert result(stage, tmp_path / "small") == reference


@pytest.mark.parametrize("name", NAMES)
def test_a_read_only_folder(stages: dict[str, Stage], one: Host, tmp_path: Path, name: str) -> None:
    stage = stages[name]
    with small_disk(tmp_path / "read-only", 1 << 20):
        assert mount("-o", "remount,ro", tmp_path / "read-only")
        code, said = run(one, stage, tmp_path / "read-only")
    assert code == 2
    assert said.startswith(f"fluxsae: {tmp_path / 'read-only'}")
    assert said.endswith("may not be written (Read-only file system); make it writable, or name another folder.")


@pytest.mark.parametrize("name", NAMES)
def test_a_drive_that_goes(stages: dict[str, Stage], one: Host, tmp_path: Path, name: str) -> None:
    """Unmounted during the work, and mounted again."""
    stage, folder, drive = stages[name], tmp_path / "away", tmp_path / "drive"
    reference = unbroken(one, stage, tmp_path / "unbroken")
    with small_disk(drive, 64 << 20):
        folder.mkdir()
        assert mount("--bind", drive, folder)
        config = folder.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(stage.config(folder)))
        one.log.write_text("")

        def unmount(seconds: float) -> None:
            if any(drive.rglob(LOCK)):
                subprocess.run(["umount", "-l", folder], check=False, capture_output=True)

        code = one.run([stage.verb, "-c", str(config)], unmount).code
        said = one.log.read_text()
        assert code == 2 and "Traceback" not in said, said
        assert not visible(result(stage, folder), stage)  # nothing went to the folder below the drive's
        assert visible(result(stage, drive), stage).items() <= reference.files.items()
        assert mount("--bind", drive, folder)
        try:
            code, said = run(one, stage, folder, *stage.again)
            assert code == 0, said
            assert result(stage, folder) == reference.files
        finally:
            subprocess.run(["umount", "-l", folder], check=False)
