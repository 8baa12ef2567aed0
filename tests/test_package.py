"""The built wheel, installed where there is no clone: what it holds, and that its commands work from any folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="the wheel is built with hatchling, which the extra dev brings")

TOP = Path(__file__).parent.parent
WANTED = (
    "fluxsae/py.typed",
    "fluxsae/bundled/configs/tiny/study.yaml",
    "fluxsae/bundled/configs/tiny/prompts.jsonl",
    "fluxsae/bundled/configs/flux-dev/memory/24GB.yaml",
    "fluxsae/bundled/checkpoints/tiny-flux/model_index.json",
    "fluxsae/bundled/checkpoints/tiny-flux/transformer/diffusion_pytorch_model.safetensors",
    "fluxsae/bundled/checkpoints/tiny-clip/open_clip_model.safetensors",
)


def build(what: str, source: Path, folder: Path) -> Path:
    """Build without a network: pip would fetch the build backend, which is here."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", what, "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    [built] = folder.glob("*.whl" if what == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", TOP, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed into, by pip, without what it depends on."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*command, "--target", str(folder), str(wheel)], check=True, capture_output=True)
    return folder


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_what_a_user_needs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert set(WANTED) <= set(names)
    assert {name.split("/")[0] for name in names} == {"fluxsae", f"fluxsae-{metadata(wheel)['Version']}.dist-info"}
    tracked = [*TOP.glob("configs/**/*"), *TOP.glob("checkpoints/tiny-*/**/*")]
    bundled = {f"fluxsae/bundled/{path.relative_to(TOP).as_posix()}" for path in tracked if path.is_file()}
    assert bundled == {name for name in names if name.startswith("fluxsae/bundled/")}
    code = {path.relative_to(TOP).as_posix() for path in TOP.glob("fluxsae/**/*.py")}
    assert code == {name for name in names if name.endswith(".py")}


def test_the_metadata_is_complete(wheel: Path) -> None:
    told = metadata(wheel)
    import fluxsae

    assert told["Version"] == fluxsae.__version__
    assert {url.split(",")[0] for url in told.get_all("Project-URL", [])} == {
        "Homepage", "Documentation", "Issues", "Changelog"
    }  # fmt: skip
    assert told["License-Expression"] == "Apache-2.0"
    assert told.get_all("License-File") == ["LICENSE", "scripts/tiny/OFL.txt"]
    assert set(told.get_all("Provides-Extra", [])) == {"bench", "dev", "docs"}
    assert told["Keywords"] and "Typing :: Typed" in told.get_all("Classifier", [])


def test_the_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", TOP, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    [source] = (tmp_path / "source").iterdir()
    again = build("wheel", source, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert {(one.filename, one.CRC) for one in first.infolist()} == {
            (one.filename, one.CRC) for one in second.infolist()
        }


def run(site: Path, folder: Path, *arguments: str) -> str:
    """What `fluxsae` of the installed wheel says, run in `folder`, which knows nothing of this clone."""
    return python(site, folder, str(site / "bin" / "fluxsae"), *arguments)


def python(site: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_commands_run_where_there_is_no_clone(site: Path, tmp_path: Path) -> None:
    assert python(site, tmp_path, "-c", "import fluxsae; print(fluxsae.__file__)").startswith(str(site))
    assert re.fullmatch(r"fluxsae [\d.]+\n", run(site, tmp_path, "--version"))
    (tmp_path / "prompts.txt").write_text("a small fox, blue background\na large house, white background\n")
    said = run(site, tmp_path, "init", "mine", "--prompts", "prompts.txt", "--sites", "single_transformer_blocks.0")
    assert "2 prompts, bundled:tiny-flux" in said and "fluxsae study -c mine/study.yaml" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "prompts.txt"]


def test_the_demo_runs_every_stage_where_there_is_no_clone(site: Path, tmp_path: Path) -> None:
    """On fewer prompts, epochs, features and steered images, which is all that is changed."""
    short, here = tmp_path / "short", tmp_path / "here"
    shutil.copytree(site, short)
    here.mkdir()
    configs = short / "fluxsae" / "bundled" / "configs" / "tiny"
    for name, n_prompts in (("prompts.jsonl", 24), ("steering-prompts.txt", 1)):
        lines = (configs / name).read_text().splitlines(keepends=True)
        (configs / name).write_text("".join(lines[:n_prompts]))
    change(configs / "steering.yaml", n_features=2, strengths="[2.0]", n_random=1, repetitions=1)
    for name in ("topk.yaml", "l1.yaml"):
        change(configs / name, max_epochs=2, check_val_every_n_epoch=1, batch_size=256, n_features=64)

    said = run(short, here, "demo")
    assert "7 of 7 stages run" in said and "Where to look" in said
    assert [path.name for path in here.iterdir()] == ["runs"]
    root = here / "runs" / "tiny"
    assert '"model": "bundled:tiny-flux"' in (root / "capture" / "generation.json").read_text()
    assert (root / "figures" / "contact_sheet.png").exists() and (root / "sae" / "checkpoints" / "last.ckpt").exists()

    short.rename(tmp_path / "elsewhere")  # as if the study had come from another machine
    assert run(tmp_path / "elsewhere", here, "demo").count("complete and unchanged, skipped") == 7


def change(config: Path, **values: object) -> None:
    text = config.read_text()
    for key, value in values.items():
        text, n_changed = re.subn(rf"(?<= {key}: ).*", str(value), text)
        assert n_changed == 1
    config.write_text(text)
