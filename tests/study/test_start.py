"""A study of one's own: what is written, and that nothing is when something is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fluxsae.cli.command import main
from fluxsae.files import bundled
from fluxsae.study import read_config, read_study, start_study


@pytest.mark.parametrize("like", ["tiny", "flux-dev"])
def test_it_is_the_bundled_study_at_another_root(tmp_path: Path, like: str) -> None:
    start = start_study(tmp_path / "mine", like)
    study, template = read_study(tmp_path / "mine" / "study.yaml"), read_study(bundled("configs") / like / "study.yaml")
    assert study.root == tmp_path / "mine" / "run" and study.names == template.names
    for stage, theirs in zip(study.stages, template.stages, strict=True):
        assert stage.outputs == tuple(study.root / path.relative_to(template.root) for path in theirs.outputs)
        moved = str(read_config(theirs.config, study.root)).replace(str(theirs.config.parent), str(tmp_path / "mine"))
        assert str(read_config(stage.config, study.root)) == moved
    assert start.check == () and start.n_prompts > 500
    assert (tmp_path / "mine" / "prompts.jsonl").read_bytes() == (
        bundled("configs") / like / "prompts.jsonl"
    ).read_bytes()


def test_comments_stay_and_name_the_new_files(tmp_path: Path) -> None:
    start_study(tmp_path / "mine")
    lines = (tmp_path / "mine" / "topk.yaml").read_text().splitlines()
    assert lines[0] == f"# fluxsae fit -c {tmp_path}/mine/topk.yaml" and lines[1].startswith("# A TopK SAE")


def test_model_prompts_site_and_step_are_put_in(tmp_path: Path, tiny_flux: Path) -> None:
    (tmp_path / "own.csv").write_text("prompt,colour\na fox,red\na cat,blue\n")
    sites = ["single_transformer_blocks.1:text", "transformer_blocks.0.ff"]
    start = start_study(tmp_path / "mine", "tiny", tmp_path / "own.csv", str(tiny_flux), sites, [2, 5])
    capture = read_config(tmp_path / "mine" / "capture.yaml")
    settings = capture["model"]["init_args"]
    assert (settings["model"], settings["sites"], settings["steps"]) == (str(tiny_flux), sites, [2, 5])
    assert capture["data"]["init_args"]["prompts"] == str(tmp_path / "mine" / "prompts.csv")
    assert start.n_prompts == 2 and len(start.check) == 3
    for name in ("topk", "l1", "jumprelu", "batch-topk", "matryoshka"):
        values = read_config(tmp_path / "mine" / f"{name}.yaml")
        assert values["model"]["init_args"]["sae"]["init_args"]["d_in"] == 32
        shards = values["data"]["init_args"]["shards"]
        assert shards == f"{tmp_path}/mine/run/capture/single_transformer_blocks.1@text/step-02"


def test_a_folder_is_named_by_its_full_path(tmp_path: Path, tiny_flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_flux, tmp_path / "flux")
    monkeypatch.chdir(tmp_path)
    start_study(Path("mine"), model="flux", sites=["transformer_blocks.0"])
    assert read_config(Path("mine/capture.yaml"))["model"]["init_args"]["model"] == str(tmp_path / "flux")


def test_a_width_that_cannot_be_known_is_left_and_told(tmp_path: Path) -> None:
    start = start_study(tmp_path / "mine", "flux-dev", model="black-forest-labs/FLUX.1-schnell")
    assert any("`d_in:`" in text for text in start.check)
    assert read_config(tmp_path / "mine" / "topk.yaml")["model"]["init_args"]["sae"]["init_args"]["d_in"] == 3072


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--like", "tny"], "unknown study 'tny' of --like: did you mean 'tiny'?"),
        (["--prompts", "nowhere.txt"], "there is no prompts file nowhere.txt"),
        (["--prompts", "pyproject.toml"], "has suffix '.toml'"),
        (["--model", "./nowhere"], "there is no folder nowhere"),
        (["--model", "bundled:tiny-flx"], "did you mean 'tiny-flux'?"),
        (["--sites", "transformer_blocks.7"], "is no module of this transformer"),
        (["--sites", "block 3"], "is not a module path"),
        (["--steps", "12"], "step 12 is beyond the schedule"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "mine"), *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (tmp_path / "mine").exists()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "study.yaml").write_text("mine")
    assert main(["init", str(tmp_path / "mine")]) == 2
    assert "has a study.yaml already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["study.yaml"]


def test_the_next_command_is_told_and_finds_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path / "my study")]) == 0
    assert f"fluxsae study -c '{tmp_path}/my study/study.yaml'" in capsys.readouterr().out
    assert read_study(tmp_path / "my study" / "study.yaml").root == tmp_path / "my study" / "run"
