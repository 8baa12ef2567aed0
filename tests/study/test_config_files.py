"""Folders that configs say by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxsae.study.config_files import names_root, read_config, root_beside


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_here_is_the_file_s_folder_and_root_the_study_s(tmp_path: Path) -> None:
    config = write(tmp_path / "a.yaml", "x: ['${here}/p', {y: '${root}/q, ${root}'}]\nn: 3\nkept: $${root} $5\n")
    write(tmp_path / "study.yaml", "root: runs/it\nstages: []\n")
    read = read_config(config)
    assert read == {"x": [f"{tmp_path}/p", {"y": "runs/it/q, runs/it"}], "n": 3, "kept": "${root} $5"}
    assert read_config(config, Path("other"))["x"][1]["y"] == "other/q, other"


def test_a_root_can_lie_beside_the_study(tmp_path: Path) -> None:
    write(tmp_path / "study.yaml", "root: '${here}/run'\n")
    assert root_beside(tmp_path / "a.yaml") == tmp_path / "run"


def test_the_first_edition_s_folder_is_a_root(tmp_path: Path) -> None:
    write(tmp_path / "study.yaml", "folder: runs/it\n")
    assert root_beside(tmp_path / "a.yaml") == Path("runs/it")


def test_without_a_root_only_what_needs_it_is_refused(tmp_path: Path) -> None:
    assert read_config(write(tmp_path / "a.yaml", "x: '${here}'")) == {"x": str(tmp_path)}
    with pytest.raises(ValueError, match=r"b\.yaml says \$\{root\}, and no study\.yaml beside it .* add --root"):
        read_config(write(tmp_path / "b.yaml", "x: '${root}/y'"))


@pytest.mark.parametrize(("name", "said"), [("rooot", "did you mean 'root'"), ("HOME", "knows here, root"), ("", "")])
def test_an_unknown_folder_is_refused(tmp_path: Path, name: str, said: str) -> None:
    config = write(tmp_path / "a.yaml", f"x: '${{{name}}}/y'")
    with pytest.raises(ValueError, match=rf"a\.yaml: unknown folder {name!r} of a config.*{said}"):
        read_config(config, tmp_path)


def test_which_values_depend_on_the_root() -> None:
    assert names_root({"a": ["x", {"b": "${root}/y"}]})
    assert not names_root({"a": ["${here}", "$${root}", 3, None]})
