"""Every file in `configs/`: it fits the real signatures, and a study of them runs on a random FLUX."""

from __future__ import annotations

import json
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file

from fluxsae.cli.command import main
from fluxsae.cli.figures import read_figures
from fluxsae.cli.trainer import TrainerCLI
from fluxsae.data.activations import ActivationData
from fluxsae.files.json_files import read_json
from fluxsae.files.tables import read_csv
from fluxsae.models.load import load_pipeline
from fluxsae.records.features import Selection, read_features
from fluxsae.records.prompts import read_prompts
from fluxsae.sae import TopK
from fluxsae.sae.checkpoint import load_sae
from fluxsae.study.config_files import read_config, read_mapping
from fluxsae.study.plan import read_study
from fluxsae.training.module import SAETraining
from tests.random_flux import random_flux
from tests.synthetic import token_shards

CONFIGS = Path(__file__).parent.parent / "configs"
STUDIES = sorted(path.parent.name for path in CONFIGS.glob("*/study.yaml"))
STAGES = {path.stem for path in CONFIGS.glob("*/*.yaml")} - {"study", "figures"}
VARIANTS = ("batch-topk", "gated", "jumprelu", "matryoshka", "sweep")
"""Further trainings on a study's capture, which it does not run by itself."""
TRAININGS = [path for path in sorted(CONFIGS.glob("*/*.yaml")) if "max_epochs" in path.read_text()]
BLOCKS = {"tiny": (2, 4), "flux-dev": (16, 2)}
"""Dual-stream and single-stream blocks of the stand-ins: as many as the sites in the configs ask for."""
N_FEATURES, WIDTH = 48, 16
HOSTILE = "=fox {} $x^$ \x1b[2J\u202e\n../../etc/passwd, <b>%s 🦊" + "a" * 10_000
"""As prompt and as the label of every feature: what terminals, pictures, tables and file names could trip over."""


def test_every_config_belongs_to_a_study_or_varies_one() -> None:
    for name in STUDIES:
        named = {stage.config.name for stage in read_study(CONFIGS / name / "study.yaml").stages}
        known = named | {"study.yaml"} | {f"{variant}.yaml" for variant in VARIANTS}
        assert known == {path.name for path in (CONFIGS / name).glob("*.yaml")}


def parse(verb: str, path: Path) -> Any:
    parser_only = type("ParserOnly", (TrainerCLI,), {"instantiate_classes": lambda self: None})
    return parser_only.start(verb, ["-c", str(path)], run=False).config  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_config_fits_the_signatures(name: str, stage: str) -> None:
    verbs = {s.name: s.command for s in read_study(CONFIGS / name / "study.yaml").stages}
    verb = "fit" if stage in VARIANTS else verbs[stage]
    assert parse(verb, CONFIGS / name / f"{stage}.yaml").model.class_path.startswith("fluxsae.")


class LongEpochs(Callback):
    """A step takes ten minutes. Knows which step the last checkpoint was of whenever an epoch began."""

    def __init__(self, last: Path) -> None:
        self.last = last
        self.seconds = 0.0
        self.saved: list[int] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.saved.append(torch.load(self.last, weights_only=True)["global_step"] if self.last.exists() else 0)

    def on_train_batch_start(self, *_: Any) -> None:
        self.seconds += 600


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_training_keeps_a_checkpoint_from_its_first_epoch_on(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured = parse("fit", path).trainer
    (kept,) = (each for each in configured.callbacks if each.class_path.endswith("Checkpoint"))
    assert kept.init_args.dirpath is None and configured.default_root_dir is None  # so they follow the SAE's folder
    module, _, name = kept.class_path.rpartition(".")
    keep = getattr(import_module(module), name)(**{**vars(kept.init_args), "dirpath": str(tmp_path / "checkpoints")})
    watch = LongEpochs(tmp_path / "checkpoints" / "last.ckpt")
    monkeypatch.setattr("fluxsae.runtime.interrupts.monotonic", lambda: watch.seconds)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    every = configured.check_val_every_n_epoch
    trainer = Trainer(accelerator="cpu", max_epochs=3, callbacks=[keep, watch], check_val_every_n_epoch=every, **quiet)
    data = ActivationData(token_shards(tmp_path / "tokens", 10, 2, size=32).folder, batch_size=12)
    trainer.fit(SAETraining(TopK(16, 24, 4), tmp_path / "sae"), data)
    assert watch.saved == [0, 6, 12]


@pytest.mark.parametrize("name", STUDIES)
def test_the_figures_fit_the_signatures(name: str) -> None:
    arguments = ["-c", str(CONFIGS / name / "figures.yaml")]
    assert read_figures(arguments).folder == Path("runs", name, "figures")
    assert read_figures([*arguments, "--root", "mine"]).select.table == Path("mine", "features.csv")


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_brings_its_prompts(name: str) -> None:
    """So that nothing but the model is left to name."""
    for stage, n_prompts in (("capture", 500), ("steering", 1)):
        values = read_config(CONFIGS / name / f"{stage}.yaml")
        assert len(read_prompts(values["data"]["init_args"]["prompts"])) >= n_prompts


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_study_s_folder_is_said_once(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith(("#", "    #"))]
    said = [line for line in lines if "runs/" in line or "configs/" in line or "checkpoints/" in line]
    assert said == ([f"root: runs/{path.parent.name}"] if path.stem == "study" else [])


@pytest.fixture(scope="module", params=STUDIES)
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configs of a study, rewritten for a random FLUX that has their sites; the path of its study.yaml."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    n_dual, n_single = BLOCKS[request.param]
    random_flux(folder / "flux", n_dual, n_single, heads=1, head_width=WIDTH, text_length=8, sample_size=32)
    random_clip(folder / "clip")
    prompts = [{"prompt": HOSTILE.format(i), "object": HOSTILE, "place": ("left", "right")[i % 2]} for i in range(14)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    for path in (CONFIGS / request.param).glob("*.yaml"):
        (folder / path.name).write_text(yaml.safe_dump(rewrite(read_mapping(path), folder)))
    return folder / "study.yaml"


def rewrite(value: Any, folder: Path) -> Any:
    """A config's values with another model, prompts and root and small sizes, and nothing else changed."""
    small = {
        "root": "${here}/run",
        "model": str(folder / "flux"),
        "prompts": str(folder / "prompts.jsonl"),
        "clip": f"local-dir:{folder / 'clip'}",
        "height": 64,
        "width": 32,
        "text_length": 8,
        "d_in": WIDTH,
        "n_features": N_FEATURES,
        "k": 4,
        "groups": [8, N_FEATURES],
        "target_l0": 4,
        "max_epochs": 2,
        "check_val_every_n_epoch": 1,
        "accelerator": "cpu",
        "batch_size": 8,
        "num_workers": 0,
        "warmup_steps": 1,
        "repetitions": 1,
        "strengths": [0.0, 2.0],
    }
    if isinstance(value, list):
        return [rewrite(part, folder) for part in value]
    if not isinstance(value, dict):
        return value
    new = {}
    for key, part in value.items():
        scalar = not isinstance(part, dict)
        fixed = key in small and scalar and "${root}" not in str(part)
        new[key] = small[key] if fixed else rewrite(part, folder)
    if "sites" in new:
        new |= {"height": 64, "width": 32, "text_length": 8}
    if new.get("class_path", "").endswith("PromptData"):
        new["init_args"]["limit"] = 14
    if new.get("class_path", "").endswith(("Coherence", "TopImages", "SteeringEffects")):
        new["init_args"] |= {"n_images": 2}
    if new.get("class_path", "").endswith(("Coherence", "SteeringEffects")):
        new["init_args"] |= {"clip": small["clip"]}
    if new.get("class_path", "").endswith("FluxSteering"):
        new["init_args"]["select"]["n_features"] = 2
        new["init_args"] |= {"n_random": 1}
    if "callbacks" in new:
        new |= {"enable_progress_bar": False}
    if "max_epochs" in new:
        new |= {"enable_progress_bar": False, "log_every_n_steps": 1}
    return new


def random_clip(folder: Path) -> None:
    """An open_clip model with random weights, in open_clip's own folder format."""
    tower = {"layers": 1, "width": 16}
    config = {
        "embed_dim": 8,
        "vision_cfg": {**tower, "image_size": 32, "patch_size": 16, "head_width": 8},
        "text_cfg": {**tower, "context_length": 8, "vocab_size": 49408, "heads": 2},
    }
    model = open_clip.CLIP(**config)
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))


def run(*arguments: object) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # a user's warnings do not stop a run
        return main([str(argument) for argument in arguments])


def test_the_study_runs_is_skipped_and_goes_on_from_a_change(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = study.parent / "run"
    assert run("study", "-c", study) == 0
    out = capsys.readouterr().out
    assert "7 of 7 stages run" in out
    for expected in ("images", "TopK", "L1", "FVE", "alive", "steering", "Where to look"):
        assert expected in out
    assert "=fox" in out and not {"\x1b", "\u202e"} & set(out)
    assert f"object={HOSTILE}" in {row.label for row in read_features(folder / "features.csv")}
    assert not [path for path in folder.rglob("*") if "passwd" in path.name or "fox" in path.name]
    assert (folder / "figures" / "contact_sheet.png").exists()
    assert len(read_features(folder / "features.csv")) == N_FEATURES
    _check_steering(folder)

    assert run("study", "-c", study) == 0
    out = capsys.readouterr().out
    assert out.count("complete and unchanged, skipped") == 7 and "0 of 7 stages run" in out

    config = study.with_name("overlays.yaml")
    values = yaml.safe_load(config.read_text())
    values["trainer"]["callbacks"][0]["init_args"]["mode"] = "patch"
    config.write_text(yaml.safe_dump(values))
    assert run("study", "-c", study) == 0
    out = capsys.readouterr().out
    assert "2 of 7 stages run" in out and "its config or input has changed" in out and "overlays ran anew" in out
    assert (folder / "replaced" / "overlays").is_dir()

    assert run("study", "-c", study, "--force", "l1", "--until", "scores") == 0
    out = capsys.readouterr().out
    assert "1 of 4 stages run" in out and "forced" in out

    assert run("validate", "-c", study.with_name("topk.yaml")) == 0
    assert run("verify", folder / "capture") == 0
    assert "whole" in capsys.readouterr().out


def _check_steering(folder: Path) -> None:
    rows = read_csv(folder / "steering" / "effects.csv")
    still = [row for row in rows if float(row["strength"]) == 0]
    moved = [row for row in rows if float(row["strength"]) != 0]
    assert still and all(
        abs(float(row[name])) < 1e-6 for row in still for name in ("ssim_distance", "activation_change")
    )
    assert moved and all(float(row["ssim_distance"]) > 0 for row in moved)
    assert {row["kind"] for row in rows} == {"feature", "random"}
    select = read_config(folder.parent / "steering.yaml")["model"]["init_args"]["select"]
    features = {row.feature for row in Selection(**{**select, "table": Path(select["table"])}).rows()}
    assert {int(row["feature"]) for row in rows} == features
    assert {path.name for path in (folder / "steering").glob("*.png")} == {f"feature-{f:05d}.png" for f in features}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variants_train_on_the_study_s_capture(study: Path, variant: str) -> None:
    folder = study.parent / "run"
    if not (folder / "capture").exists():
        assert run("study", "-c", study, "--until", "capture") == 0
    assert run("fit", "-c", study.with_name(f"{variant}.yaml")) == 0
    left = sorted((folder / "sweep").iterdir()) if variant == "sweep" else [folder / f"sae-{variant}"]
    saes = [load_sae(path) for path in left if (path / "config.json").exists()]
    assert len(saes) == (4 if variant == "sweep" else 1)
    assert all(sae.spec is not None and sae.n_features == N_FEATURES for sae in saes)
    assert run("validate", "-c", study.with_name(f"{variant}.yaml")) == 0


def test_what_the_readme_shows_runs(study: Path) -> None:
    import fluxsae

    folder = study.parent / "run"
    if not (folder / "sae").exists():
        assert run("study", "-c", study) == 0
    pipe, sae = load_pipeline(study.parent / "flux"), load_sae(folder / "sae")
    assert sae.spec is not None
    site, step = sae.spec.site, sae.spec.step
    with fluxsae.record(pipe, sites=[site], steps=[step]) as tape:
        pipe(["a small fox"] * 2, num_inference_steps=step + 1, max_sequence_length=8)
    codes = sae.encode(tape[site, step])
    assert codes.shape[0] == 2 and codes.shape[2] == sae.n_features
    with fluxsae.intervene(pipe, sae, add={17: 4.0}, steps=range(step)):
        steered = pipe(["a small fox"], num_inference_steps=step + 1, max_sequence_length=8).images
    assert len(steered) == 1
    scores = fluxsae.Scores.open(folder / "scores")
    assert scores.matrix.shape == (read_json(folder / "capture" / "generation.json")["n_images"], sae.n_features)
    assert torch.isfinite(codes).all()
