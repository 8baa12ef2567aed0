"""What config files and a command line say together: folders by name, and values that replace what stood there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fluxsae.cli import config_arguments
from fluxsae.cli.command import main
from fluxsae.cli.config_arguments import read_arguments
from fluxsae.cli.figures import read_figures
from fluxsae.cli.trainer import TrainerCLI
from tests.synthetic import token_shards

ParserOnly: Any = type("ParserOnly", (TrainerCLI,), {"instantiate_classes": lambda self: None})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return token_shards(tmp_path / "tokens", 10, 2, size=32).folder


def training(shards: Path, **trainer: Any) -> dict[str, Any]:
    sae = {"class_path": "fluxsae.TopK", "init_args": {"d_in": 16, "n_features": 24, "k": 4}}
    return {
        "model": {"class_path": "fluxsae.SAETraining", "init_args": {"sae": sae, "folder": "${root}/sae", "lr": 0.01}},
        "data": {"class_path": "fluxsae.ActivationData", "init_args": {"shards": str(shards), "batch_size": 12}},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "callbacks": [{"class_path": "fluxsae.LastCheckpoint", "init_args": {"minutes": 7, "every_n_steps": 3}}],
            **trainer,
        },
    }


@pytest.fixture
def config(tmp_path: Path, shards: Path) -> Path:
    """A training of a study in `here`, whose root is `here/run`."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "study.yaml").write_text("root: ${here}/run\nstages: []\n")
    return write(here / "topk.yaml", training(shards))


def write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def parse(*arguments: object) -> Any:
    return ParserOnly.start("fit", list(map(str, arguments)), run=False).config


def callbacks(*arguments: object) -> list[tuple[str, Any]]:
    found = parse(*arguments).trainer.callbacks
    found = found if isinstance(found, list) else [found]
    return [(one.class_path.rpartition(".")[2], one.init_args.get("minutes")) for one in found]


def test_a_config_run_alone_finds_its_root(config: Path) -> None:
    assert parse("-c", config).model.init_args.folder == config.parent / "run" / "sae"
    assert parse("-c", config, "--root", "x").model.init_args.folder == Path("x/sae")
    assert parse("-c", config, "--root=x", "--model.folder", "${root}/y").model.init_args.folder == Path("x/y")


def test_several_files_share_the_root_of_the_first_that_has_one(config: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    values = training(tmp_path)["model"]
    values["init_args"]["folder"] = "${root}/b"
    more = write(tmp_path / "elsewhere" / "more.yaml", {"model": values})
    for order in ((config, more), (more, config)):
        parsed = parse("-c", order[0], "-c", order[1])
        assert parsed.model.init_args.folder == config.parent / "run" / ("b" if order[0] == config else "sae")


def test_a_root_that_nothing_depends_on_is_refused(config: Path, shards: Path) -> None:
    values = training(shards)
    values["model"]["init_args"]["folder"] = "sae"
    with pytest.raises(ValueError, match=r"--root is x, and nothing in .* depends on it"):
        parse("-c", write(config, values), "--root", "x")


@pytest.mark.parametrize("arguments", [["--root"], ["--root", "--x"], ["-c"]])
def test_an_option_without_its_value_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="names no"):
        read_arguments(arguments)


LAST, PROGRESS = "fluxsae.LastCheckpoint", "lightning.pytorch.callbacks.TQDMProgressBar"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], [("LastCheckpoint", 7.0)]),
        (["--trainer.callbacks", LAST], [("LastCheckpoint", 5.0)]),
        ([f"--trainer.callbacks={LAST}"], [("LastCheckpoint", 5.0)]),
        ([f"--trainer.callbacks=[{LAST}]"], [("LastCheckpoint", 5.0)]),
        ([f"--trainer.callbacks=[{{class_path: {LAST}}}]"], [("LastCheckpoint", 5.0)]),
        ([f"--trainer.callbacks={LAST}", "--trainer.callbacks.every_n_steps=2"], [("LastCheckpoint", 5.0)]),
        ([f"--trainer.callbacks=[{PROGRESS}]"], [("TQDMProgressBar", None)]),
        ([f"--trainer.callbacks+={PROGRESS}"], [("LastCheckpoint", 7.0), ("TQDMProgressBar", None)]),
        (["--trainer.callbacks.minutes=3"], [("LastCheckpoint", 3.0)]),
    ],
)
def test_a_callback_that_is_replaced_leaves_nothing(
    arguments: list[str], expected: list[tuple[str, Any]], config: Path
) -> None:
    assert callbacks("-c", config, *arguments) == expected


def test_a_later_file_s_callbacks_replace_and_its_mappings_complete(config: Path, tmp_path: Path) -> None:
    later = {"trainer": {"callbacks": [{"class_path": LAST}]}, "model": {"init_args": {"lr": 0.5}}}
    more = write(tmp_path / "more.yaml", later)
    assert callbacks("-c", config, "-c", more) == [("LastCheckpoint", 5.0)]
    parsed = parse("-c", config, "-c", more)
    assert parsed.model.init_args.lr == 0.5 and parsed.model.init_args.sae.init_args.k == 4
    later["model"] = {"class_path": "fluxsae.SAETraining", "init_args": {"lr": 0.5}}
    assert parse("-c", config, "-c", write(more, later)).model.init_args.sae.init_args.k == 4


def test_a_class_that_is_replaced_leaves_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = ["--model.sae", "fluxsae.BatchTopK", "--model.sae.d_in=16", "--model.sae.n_features=24"]
    assert main(["fit", "-c", str(config), *sae]) == 2
    assert "BatchTopK needs k (at model.sae); what the command line names replaces all" in capsys.readouterr().err
    assert parse("-c", config, *sae, "--model.sae.k=2").model.init_args.sae.init_args.k == 2
    data = parse("-c", config, "--data", "fluxsae.ActivationData", "--data.shards=s").data.init_args
    assert (data.shards, data.batch_size) == (Path("s"), 8192)
    whole = ["--model", "fluxsae.SAETraining", *sae, "--model.sae.k=2", "--model.folder=f"]
    assert parse("-c", config, *whole).model.init_args.lr is None
    with pytest.raises(argparse.ArgumentError, match="SAETraining needs sae, folder"):
        parse("-c", config, "--model.class_path", "fluxsae.SAETraining")


def test_single_options_replace_themselves_alone(config: Path) -> None:
    parsed = parse("-c", config, "--model.init_args.sae.init_args.k", "3", "--trainer.max_epochs=5")
    assert parsed.model.init_args.sae.init_args.k == 3 and parsed.model.init_args.lr == 0.01
    assert parsed.trainer.max_epochs == 5 and parsed.trainer.accelerator == "cpu"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trainer.max_epoch=3"], "unknown key 'max_epoch' of 'trainer': did you mean 'max_epochs'?"),
        (["--modle.lr=3"], "unknown key 'modle' of the command line: did you mean 'model'?"),
        (["--model.init_args.rl=3"], "unknown key 'rl' of SAETraining"),
        (["--model.folder=${rot}/x"], "the command line: unknown folder 'rot' of a config: did you mean 'root'?"),
    ],
)
def test_a_wrong_override_is_one_sentence(
    arguments: list[str], said: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "-c", str(config), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_file_at_fault_is_named(config: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = training(shards)
    values["model"]["init_args"]["sae"]["init_args"]["kk"] = 1
    write(config, values)
    assert main(["fit", "-c", str(config)]) == 2
    assert f"fluxsae: {config}: unknown key 'kk' of TopK: did you mean 'k'?" in capsys.readouterr().err


def test_logs_and_checkpoints_follow_the_sae(config: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert main(["fit", "-c", str(config), f"--model.folder={other}", "--trainer.callbacks.minutes=0"]) == 0
    assert {path.name for path in other.iterdir()} >= {"checkpoints", "lightning_logs", "config.json"}
    assert sorted(path.name for path in config.parent.iterdir()) == ["study.yaml", "topk.yaml"]
    last = other / "checkpoints" / "last.ckpt"
    before = torch.load(last, weights_only=True)["global_step"]
    resume = ["--ckpt_path", "last", "--trainer.max_epochs=3", "--trainer.logger=false"]
    assert main(["fit", "-c", str(config), f"--model.folder={other}", *resume]) == 0
    assert torch.load(last, weights_only=True)["global_step"] == before * 3 // 2
    assert sorted(path.name for path in config.parent.iterdir()) == ["study.yaml", "topk.yaml"]


def test_another_root_takes_everything_along(config: Path, tmp_path: Path) -> None:
    assert main(["fit", "-c", str(config), "--root", str(tmp_path / "other")]) == 0
    assert (tmp_path / "other" / "sae" / "checkpoints" / "last.ckpt").exists()
    assert sorted(path.name for path in config.parent.iterdir()) == ["study.yaml", "topk.yaml"]


def test_a_sweep_s_logs_lie_above_its_members(config: Path, shards: Path, tmp_path: Path) -> None:
    members = {}
    for name in ("a", "b"):
        member = training(shards)["model"]
        member["init_args"]["folder"] = f"${{root}}/sweep/{name}"
        members[name] = member
    values = training(shards)
    values["model"] = {"class_path": "fluxsae.SweepTraining", "init_args": {"members": members}}
    assert main(["fit", "-c", str(write(config, values)), "--root", str(tmp_path / "other")]) == 0
    left = {path.name for path in (tmp_path / "other" / "sweep").iterdir()}
    assert left == {"a", "b", "checkpoints", "lightning_logs"}


def test_a_training_of_the_first_edition_runs(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its classes where they were, folders relative to the current one, and logs and checkpoints that it names."""
    monkeypatch.chdir(tmp_path)
    old = {"class_path": "fluxsae.interrupts.LastCheckpoint", "init_args": {"dirpath": "runs/a/sae/ckpt", "minutes": 0}}
    values = training(shards, default_root_dir="runs/a/logs", callbacks=[old])
    values["model"]["class_path"] = "fluxsae.training.SAETraining"
    values["model"]["init_args"]["folder"] = "runs/a/sae"
    values["model"]["init_args"]["sae"]["class_path"] = "fluxsae.sae.TopK"
    values["data"]["class_path"] = "fluxsae.activations.ActivationData"
    assert main(["fit", "-c", str(write(tmp_path / "topk.yaml", values))]) == 0
    assert (tmp_path / "runs/a/sae/ckpt/last.ckpt").exists() and (tmp_path / "runs/a/logs/lightning_logs").exists()
    assert sorted(path.name for path in (tmp_path / "runs/a").iterdir()) == ["logs", "sae"]


def test_names_of_the_first_edition(config: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_arguments, "RENAMED_OPTIONS", {"SAETraining": {"rate": "lr"}})
    values = training(shards)
    values["model"]["class_path"] = "fluxsae.training.SAETraining"
    values["model"]["init_args"]["rate"] = values["model"]["init_args"].pop("lr")
    assert parse("-c", write(config, values)).model.init_args.lr == 0.01
    assert parse("-c", config, "--model.init_args.rate=0.5").model.init_args.lr == 0.5
    assert config_arguments.of_this_edition({"class_path": "fluxsae.analysis.overlays.Overlays"}) == {
        "class_path": "fluxsae.Overlays"
    }
    for kept in ("lightning.pytorch.Trainer", "fluxsae.sae.kinds.mine.Mine", "somebody.fluxsae.sae.TopK"):
        assert config_arguments.of_this_edition({"class_path": kept}) == {"class_path": kept}


def test_numbers_are_read_as_before(config: Path) -> None:
    config.write_text(config.read_text().replace("lr: 0.01", "lr: 1e-4"))
    assert parse("-c", config).model.init_args.lr == 1e-4


def test_figures_take_overrides(tmp_path: Path) -> None:
    values = {"folder": "${root}/figures", "select": {"table": "${root}/t.csv", "n_features": 4}, "runs": {"a": "r"}}
    config = write(tmp_path / "figures.yaml", values)
    arguments = ["-c", str(config), "--root", "x", "--select.n_features=2", "--title", "t", '--runs={"b": "q"}']
    figures = read_figures(arguments)
    assert (figures.folder, figures.select.table) == (Path("x/figures"), Path("x/t.csv"))
    assert (figures.select.n_features, figures.title, figures.runs) == (2, "t", {"b": Path("q")})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--titel=x"], "unknown key 'titel' of the command line: did you mean 'title'?"),
        (["--select.n_feature=1"], "unknown key 'n_feature' of 'select': did you mean 'n_features'?"),
        (["--select.n_features=many"], "at select.n_features"),
        ([], "says ${root}, and no study.yaml beside it"),
    ],
)
def test_a_wrong_override_of_figures_is_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = "x" if arguments else "${root}"
    config = write(tmp_path / "figures.yaml", {"folder": f"{root}/f", "select": {"table": f"{root}/t.csv"}})
    assert main(["figures", "-c", str(config), *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_bundled_config_is_named_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file, more = read_arguments(["-c", "bundled:tiny/topk.yaml", "--config=bundled:ddp.yaml"]).files
    assert file.values["model"]["init_args"]["folder"] == "runs/tiny/sae"
    assert more.path.name == "ddp.yaml" and more.values["trainer"]["strategy"]
    assert main(["fit", "-c", "bundled:tiny/topkk.yaml"]) == 2
