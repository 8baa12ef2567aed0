"""The command line: what it tells, and that each mistake ends in one sentence and a non-zero exit code."""

from __future__ import annotations

import gc
import shlex
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fluxsae.cli.command import main
from fluxsae.cli.config_errors import explain, innermost
from fluxsae.models.load import load_pipeline
from tests.random_flux import random_flux

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_flux(tmp_path_factory.mktemp("cli") / "flux", 1, 1, heads=1, head_width=8, text_length=8)


@pytest.fixture
def capture(tmp_path: Path, flux: Path) -> dict[str, Any]:
    """A sound capture config."""
    (tmp_path / "prompts.txt").write_text("a fox\n")
    settings = {"sites": ["transformer_blocks.0.ff"], "steps": [1], "height": 32, "width": 32, "n_steps": 2}
    return {
        "model": {
            "class_path": "fluxsae.FluxCapture",
            "init_args": {"model": str(flux), "folder": str(tmp_path / "capture"), **settings},
        },
        "data": {"class_path": "fluxsae.PromptData", "init_args": {"prompts": str(tmp_path / "prompts.txt")}},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }


def fails(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that a command ends with, which is all that it says."""
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.startswith("fluxsae: ") and err.count("\n") == 1 and "Traceback" not in err
    assert "Union" not in err and "Namespace" not in err
    return err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda c: c["model"]["init_args"].update(hieght=32),
            "unknown key 'hieght' of FluxCapture: did you mean 'height'?",
        ),
        (
            lambda c: c["data"]["init_args"].update(prompt="x"),
            "unknown key 'prompt' of PromptData: did you mean 'prompts'?",
        ),
        (lambda c: c["trainer"].update(acelerator="cpu"), "did you mean 'accelerator'?"),
        (lambda c: c.update(modle={}), "unknown key 'modle' of"),
        (lambda c: c["model"].update(class_path="fluxsae.FluxCapturer"), "did you mean 'FluxCapture'?"),
        (lambda c: c["model"]["init_args"].update(n_steps="many"), "expected int, not many (at model.n_steps)"),
        (
            lambda c: c["model"]["init_args"].update(height=100),
            "height 100 is not a positive multiple of 16 pixels; use 96",
        ),
        (lambda c: c["model"]["init_args"].update(steps=[2]), "step 2 is beyond the schedule"),
        (
            lambda c: c["model"]["init_args"].update(sites=["transformer_blocks.3.ff"]),
            "is no module of this transformer",
        ),
        (lambda c: c["model"]["init_args"].update(sites=["block 3"]), "is not a module path"),
        (lambda c: c["model"]["init_args"].update(model="./nowhere"), "there is no folder nowhere"),
        (lambda c: c["data"]["init_args"].update(prompts="nowhere.txt"), "there is no prompts file nowhere.txt"),
        (lambda c: c.pop("model"), "nothing says what 'model' is"),
    ],
)
def test_a_mistake_in_a_config_is_one_sentence(
    change: Change, said: str, capture: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(capture)
    (tmp_path / "capture.yaml").write_text(yaml.safe_dump(capture))
    assert said in fails(["predict", "-c", str(tmp_path / "capture.yaml")], capsys)
    assert not (tmp_path / "capture").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("stduy -c x.yaml", "unknown command 'stduy' of fluxsae: did you mean 'study'?"),
        ("study", "required: -c/--config"),
        ("study -c nowhere.yaml --unti capture", "unrecognized arguments: --unti"),
        ("study -c nowhere.yaml", "there is no config file nowhere.yaml"),
        ("predict -c nowhere.yaml", "there is no config file nowhere.yaml"),
        ("figures -c nowhere.yaml", "there is no config file nowhere.yaml"),
        ("figures", "nothing says what 'folder, table' is"),
        ("dmeo", "did you mean 'demo'?"),
        ("demo --until nothing", "this study has no stage 'nothing'"),
        ("init", "required: FOLDER"),
        ("fit", "nothing says what 'model' is"),
        ("verify nowhere", "there is no folder nowhere"),
        ("verify docs", "docs holds no shard set"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in fails(command.split(), capsys)


def test_broken_yaml_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.yaml").write_text("model: [")
    for command in ("predict", "study"):
        assert "no valid YAML" in fails([command, "-c", str(tmp_path / "broken.yaml")], capsys)


def test_stages_in_the_wrong_order_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "model": {"class_path": "fluxsae.SAEScoring", "init_args": {"sae": str(tmp_path / "sae")}},
        "data": {"class_path": "fluxsae.ActivationData", "init_args": {"shards": str(tmp_path / "shards")}},
        "trainer": {"accelerator": "cpu"},
    }
    (tmp_path / "scores.yaml").write_text(yaml.safe_dump(config))
    assert "there is no SAE at" in fails(["predict", "-c", str(tmp_path / "scores.yaml")], capsys)
    config["model"] = {
        "class_path": "fluxsae.SAETraining",
        "init_args": {
            "sae": {"class_path": "fluxsae.TopK", "init_args": {"d_in": 8, "n_features": 16, "k": 2}},
            "folder": str(tmp_path / "sae"),
        },
    }
    config["trainer"] = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}  # type: ignore[dict-item]
    (tmp_path / "topk.yaml").write_text(yaml.safe_dump(config))
    assert "there is no folder" in fails(["fit", "-c", str(tmp_path / "topk.yaml")], capsys)


def test_a_config_of_another_command_is_one_sentence(
    capture: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "capture.yaml").write_text(yaml.safe_dump(capture))
    said = fails(["fit", "-c", str(tmp_path / "capture.yaml")], capsys)
    assert "FluxCapture is nothing to fit; run its config with `fluxsae predict`" in said


def test_a_sound_config_captures(capture: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "capture.yaml").write_text(yaml.safe_dump(capture))
    assert main(["predict", "-c", str(tmp_path / "capture.yaml")]) == 0
    shards = tmp_path / "capture" / "transformer_blocks.0.ff" / "step-01"
    assert (shards / "metadata.json").exists()
    assert main(["verify", str(tmp_path / "capture")]) == 0
    tar = next(shards.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-700])
    assert main(["verify", str(tmp_path / "capture")]) == 1
    out = capsys.readouterr().out
    assert tar.name in out and "run the capture again" in out
    remove, path = shlex.split(out.split("capture again:\n")[1])[1:3]
    assert (remove, path) == ("-f", str(tar))
    tar.unlink()
    assert main(["predict", "-c", str(tmp_path / "capture.yaml")]) == 0
    assert main(["verify", str(tmp_path / "capture")]) == 0


def test_nothing_keeps_what_a_stage_had_in_memory(
    capture: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study's next stage wants the memory of the GPU for itself."""
    loaded = []

    def load(*arguments: Any, **named: Any) -> Any:
        pipe = load_pipeline(*arguments, **named)
        loaded.append(weakref.ref(pipe.transformer))
        return pipe

    monkeypatch.setattr("fluxsae.capture.module.load_pipeline", load)
    (tmp_path / "capture.yaml").write_text(yaml.safe_dump(capture))
    assert main(["predict", "-c", str(tmp_path / "capture.yaml")]) == 0
    gc.collect()
    [transformer] = loaded
    assert transformer() is None


def test_the_traceback_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "nowhere", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_help_needs_no_torch_and_names_every_command() -> None:
    code = """if True:
        import sys, fluxsae.cli
        try: fluxsae.cli.main(["--help"])
        except SystemExit: pass
        assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("init", "study", "demo", "fit", "validate", "predict", "test", "figures", "verify"):
        assert f"\n    {command} " in done.stdout


def test_every_exported_name_is_there() -> None:
    import fluxsae

    assert set(fluxsae.__all__) == set(fluxsae._ROOM)
    for name in fluxsae.__all__:
        assert getattr(fluxsae, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fluxsae.nothing


def test_a_report_is_followed_to_its_innermost_statement() -> None:
    report = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'LightningModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'fluxsae.SAETraining':
        Parser key "sae":
          Problem with given class_path 'fluxsae.TopK':
            Option 'kk' is not accepted
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>"""
    found = innermost(report)
    assert (found.keys, found.class_path, found.text) == (
        ("model", "sae"),
        "fluxsae.TopK",
        "Option 'kk' is not accepted",
    )
    assert explain(report, {}) == "unknown key 'kk' of TopK: did you mean 'k'? (at model.sae)"
