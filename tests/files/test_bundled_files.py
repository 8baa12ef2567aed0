"""What comes with the package is found by name, wherever the package lies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fluxsae.files import bundled as public
from fluxsae.files.bundled_files import bundled, config_file, weights_folder
from fluxsae.models.load import model_folder, weights_identity
from fluxsae.scoring.clip import load_clip
from fluxsae.study.plan import content_hash

TOP = Path(__file__).parents[2]


def test_a_clone_has_it_at_its_top() -> None:
    assert bundled("configs/tiny") == TOP / "configs" / "tiny"
    assert weights_folder("bundled:tiny-flux") == TOP / "checkpoints" / "tiny-flux"
    assert weights_folder("some/where") == Path("some/where")
    assert public is bundled


def test_an_installed_package_has_it_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fluxsae" / "bundled" / "configs").mkdir(parents=True)
    monkeypatch.setattr("fluxsae.files.bundled_files._PACKAGE", tmp_path / "fluxsae")
    assert bundled("configs") == tmp_path / "fluxsae" / "bundled" / "configs"


def test_an_unknown_name_is_told_what_was_meant() -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'tiny-flux'"):
        weights_folder("bundled:tiny-flx")


def test_weights_are_the_same_by_either_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(TOP / "checkpoints" / "tiny-flux", copy)
    monkeypatch.chdir(tmp_path)
    assert model_folder("bundled:tiny-flux") == TOP / "checkpoints" / "tiny-flux"
    assert weights_identity("bundled:tiny-flux") == weights_identity("copy")
    assert content_hash(weights_folder("bundled:tiny-flux")) == content_hash(copy)
    assert load_clip("bundled:tiny-clip").model is not None


def test_configs_that_come_with_the_package_have_names() -> None:
    assert config_file("bundled:flux-dev/memory/24GB.yaml") == TOP / "configs" / "flux-dev" / "memory" / "24GB.yaml"
    assert config_file("configs/ddp.yaml") == Path("configs/ddp.yaml")
