"""When a stage of a study runs, is skipped, goes on, or is refused; the stages here only leave a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from fluxsae.files.json_files import read_json, write_json
from fluxsae.study.config_files import read_config
from fluxsae.study.plan import RECORD, content_hash, plan, read_study
from fluxsae.study.run import run_study


class Runs(list[str]):
    """Stands in for the Trainer: notes which config ran and leaves the file that it names."""

    fail: str = ""

    def __call__(self, command: str, config: Path, more: Sequence[str], root: Path) -> None:
        path = config
        self.append(path.stem)
        if path.stem == self.fail:
            raise KeyboardInterrupt
        out = Path(read_config(path, root)["out"])
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(path.stem)


@pytest.fixture
def runs() -> Runs:
    return Runs()


FORMS = {
    "root": ("${root}", "${here}", "", ""),
    "folder": (".../run", "...", ".../", ".../run/"),
}
"""How configs name the study's folder and their own, and what stands before a stage's config and outputs, where `...`
is the study's folder by its full path: today, and in the first edition."""


def write_study(folder: Path, form: str = "root") -> Path:
    """capture → a, b; a → c. The capture reads prompts.txt."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("a fox\n")
    root, here, before_config, before_output = (part.replace("...", str(folder)) for part in FORMS[form])
    needs = {"capture": [], "a": ["capture"], "b": ["capture"], "c": ["a"]}
    stages = []
    for name, needed in needs.items():
        values = {"out": f"{root}/{name}", "prompts": f"{here}/prompts.txt" if not needed else ""}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
        config, output = f"{before_config}{name}.yaml", f"{before_output}{name}"
        stages.append({"name": name, "command": "predict", "config": config, "outputs": [output], "needs": needed})
    path = folder / "study.yaml"
    says = "${here}/run" if form == "root" else str(folder / "run")
    path.write_text(yaml.safe_dump({form: says, "stages": stages}))
    return path


@pytest.fixture(params=FORMS)
def study(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_study(tmp_path, request.param)


def change(path: Path) -> None:
    path.write_text(path.read_text() + "more: 1\n")


def test_all_run_in_order_and_then_none(study: Path, runs: Runs) -> None:
    run_study(study, runs)
    assert runs == ["capture", "a", "b", "c"]
    run_study(study, runs)
    assert len(runs) == 4


def test_a_changed_config_redoes_its_stage_and_what_needs_it(study: Path, runs: Runs) -> None:
    run_study(study, runs)
    runs.clear()
    change(study.with_name("a.yaml"))
    run_study(study, runs)
    assert runs == ["a", "c"]


def test_a_comment_changes_nothing(study: Path, runs: Runs) -> None:
    run_study(study, runs)
    runs.clear()
    path = study.with_name("a.yaml")
    path.write_text("# a remark\n" + path.read_text())
    run_study(study, runs)
    assert runs == []


def test_a_changed_input_file_redoes_all(study: Path, runs: Runs) -> None:
    run_study(study, runs)
    runs.clear()
    study.with_name("prompts.txt").write_text("a cat\n")
    run_study(study, runs)
    assert runs == ["capture", "a", "b", "c"]


def test_a_missing_output_is_made_again(study: Path, runs: Runs) -> None:
    run_study(study, runs)
    runs.clear()
    (study.parent / "run" / "b").unlink()
    run_study(study, runs)
    assert runs == ["b"]


@pytest.mark.parametrize(("name", "expected"), [("a", ["a", "c"]), ("c", ["c"]), ("all", ["capture", "a", "b", "c"])])
def test_force_redoes_a_stage_and_what_needs_it(study: Path, runs: Runs, name: str, expected: list[str]) -> None:
    run_study(study, runs)
    runs.clear()
    run_study(study, runs, force=[name])
    assert runs == expected


def test_an_interrupted_stage_goes_on_with_what_it_left(study: Path, runs: Runs) -> None:
    part = study.parent / "run" / "a"
    runs.fail = "a"
    with pytest.raises(KeyboardInterrupt):
        run_study(study, runs)
    part.write_text("half")
    runs.fail = ""
    runs.clear()
    run_study(study, runs)
    assert runs == ["a", "b", "c"]
    assert not (study.parent / "run" / "replaced").exists()


def test_what_a_changed_stage_left_is_moved_aside(study: Path, runs: Runs) -> None:
    run_study(study, runs)
    (study.parent / "run" / "a").write_text("days of work")
    change(study.with_name("a.yaml"))
    run_study(study, runs)
    assert (study.parent / "run" / "replaced" / "a").read_text() == "days of work"
    assert (study.parent / "run" / "a").read_text() == "a"


def test_what_needs_a_forced_stage_is_redone_later_too(study: Path, runs: Runs) -> None:
    run_study(study, runs)
    run_study(study, runs, force=["a"], until="a")
    runs.clear()
    run_study(study, runs)
    assert runs == ["c"]
    run_study(study, runs)
    assert runs == ["c"]


def test_until_stops_after_a_stage(study: Path, runs: Runs) -> None:
    run_study(study, runs, until="a")
    assert runs == ["capture", "a"]


def test_a_stage_that_leaves_nothing_is_not_complete(study: Path, runs: Runs) -> None:
    values = yaml.safe_load(study.read_text())
    values["stages"][0]["outputs"].append(str(study.parent / "run" / "nothing"))
    study.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="'capture' ended without leaving"):
        run_study(study, runs)
    assert read_json(study.parent / "run" / RECORD)["capture"]["status"] == "started"


def test_the_plan_gives_reasons(study: Path, runs: Runs) -> None:
    assert {step.reason for step in plan(read_study(study))} == {"not run yet"}
    run_study(study, runs)
    assert {step.reason for step in plan(read_study(study))} == {""}
    assert [step.reason for step in plan(read_study(study), ["b"])] == ["", "", "forced", ""]


def test_what_is_no_study_is_refused(study: Path, runs: Runs) -> None:
    good = yaml.safe_load(study.read_text())

    def refused(said: str, **changes: object) -> None:
        study.write_text(yaml.safe_dump({**good, "stages": [{**good["stages"][0], **changes}]}))
        with pytest.raises(ValueError, match=said):
            run_study(study, runs)

    refused("did you mean 'config'", confg="x")
    refused("did you mean 'predict'", command="predit")
    refused("which is no stage before it", needs=["nothing"])
    refused("not in the study's folder", outputs=["/elsewhere/out"])
    study.write_text(yaml.safe_dump({"stages": good["stages"]}))
    with pytest.raises(ValueError, match="lacks the key 'root'"):
        run_study(study, runs)
    study.write_text(yaml.safe_dump(good))
    with pytest.raises(ValueError, match="no stage 'captur'; did you mean 'capture'"):
        run_study(study, runs, force=["captur"])
    assert runs == []


def test_a_damaged_record_is_named(study: Path, runs: Runs) -> None:
    write_json(study.parent / "run" / RECORD, [1])
    with pytest.raises(ValueError, match=r"study\.json is not a study's record"):
        run_study(study, runs)


def test_a_model_card_changes_nothing(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text("{}")
    before = content_hash(model)
    (model / "README.md").write_text("a card")
    assert content_hash(model) == before
    (model / "model_index.json").write_text("{ }")
    assert content_hash(model) != before


def test_another_root_is_another_study(tmp_path: Path, runs: Runs) -> None:
    study = write_study(tmp_path / "mine")
    run_study(study, runs)
    run_study(study, runs, root=tmp_path / "other")
    assert runs == ["capture", "a", "b", "c"] * 2
    assert {path.name for path in (tmp_path / "other").iterdir()} >= {"capture", "a", "b", "c", RECORD}


def test_a_study_that_was_moved_is_still_complete(tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs count as they are written, their input files by their content."""
    run_study(write_study(tmp_path / "mine"), runs)
    runs.clear()
    (tmp_path / "mine").rename(tmp_path / "moved")
    run_study(tmp_path / "moved" / "study.yaml", runs)
    monkeypatch.chdir(tmp_path / "moved")
    run_study(Path("study.yaml"), runs)
    assert runs == []
    Path("prompts.txt").write_text("a cat\n")
    run_study(Path("study.yaml"), runs, until="capture")
    assert runs == ["capture"]


def test_a_first_edition_study_has_no_other_root(tmp_path: Path, runs: Runs) -> None:
    with pytest.raises(ValueError, match="say `root:` in its place"):
        run_study(write_study(tmp_path, "folder"), runs, root=tmp_path / "other")


def test_a_wrong_folder_in_the_last_stage_is_told_before_the_first_runs(tmp_path: Path, runs: Runs) -> None:
    study = write_study(tmp_path)
    study.with_name("c.yaml").write_text("out: ${rot}/c\n")
    with pytest.raises(ValueError, match=r"c\.yaml: unknown folder 'rot' of a config: did you mean 'root'"):
        run_study(study, runs)
    assert runs == []
