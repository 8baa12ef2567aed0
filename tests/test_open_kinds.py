"""Kinds that nothing in the package knows by name do all that the others do: Gated, and one that lives in the tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import FluxPipeline

import fluxsae
from fluxsae.cli import main
from fluxsae.files import read_json
from fluxsae.kernels.reference import largest
from fluxsae.sae import SAE, TopK
from fluxsae.sae.base import CAPABILITIES, kinds_with
from fluxsae.sae.pooling import PlainPooling, pooling_of
from fluxsae.sae.registry import class_path, find_kind
from fluxsae.sae.sharding import refuse_unshardable
from fluxsae.training.steps import RunFacts
from fluxsae.training.steps.choice import why_not_fused
from tests.synthetic import dictionary, image_shards, randomised, token_shards
from tests.toy_kind import SoftThreshold

D_IN, N_FEATURES = 32, 48
KINDS = {"fluxsae.Gated": {"l1": 0.3}, "tests.toy_kind.SoftThreshold": {"margin": 0.2, "weight": 0.1}}
PROMPTS = 10


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("capture")
    token_shards(folder / "tokens", PROMPTS, 2, d_in=D_IN, source=dictionary(D_IN, 24, active=2.0))
    image_shards(folder / "images", PROMPTS, 2)
    lines = [json.dumps({"prompt": f"a small thing number {p}"}) + "\n" for p in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(lines))
    return folder


def run(folder: Path, verb: str, config: dict[str, Any], *more: str) -> None:
    path = folder / f"{verb}-{len(list(folder.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main([verb, "-c", str(path), *more]) == 0


def fit(capture: Path, model: dict[str, Any], epochs: int) -> dict[str, Any]:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "log_every_n_steps": 1}
    keep = {"class_path": "fluxsae.LastCheckpoint", "init_args": {"minutes": 0}}
    return {
        "seed_everything": 0,
        "model": model,
        "data": {
            "class_path": "fluxsae.ActivationData",
            "init_args": {"shards": str(capture / "tokens"), "batch_size": 32},
        },
        "trainer": {**quiet, "max_epochs": epochs, "callbacks": [keep]},
    }


def training(kind: str, folder: Path) -> dict[str, Any]:
    sae = {"class_path": kind, "init_args": {"d_in": D_IN, "n_features": N_FEATURES, "seed": 0, **KINDS[kind]}}
    init = {"sae": sae, "folder": str(folder), "lr": 0.01, "warmup_steps": 5, "sparsity_warmup_steps": 5}
    return {"class_path": "fluxsae.SAETraining", "init_args": init}


def predict(capture: Path, model: str, sae: Path, callbacks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": {"class_path": model, "init_args": {"sae": str(sae)}},
        "data": {"class_path": "fluxsae.ActivationData", "init_args": {"shards": str(capture / "tokens")}},
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "callbacks": callbacks},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_trains_resumes_scores_maps_and_steers(
    capture: Path, tmp_path: Path, tiny_pipe: FluxPipeline, kind: str
) -> None:
    run(tmp_path, "fit", fit(capture, training(kind, tmp_path / "whole"), 4))
    run(tmp_path, "fit", fit(capture, training(kind, tmp_path / "sae"), 2))
    run(tmp_path, "fit", fit(capture, training(kind, tmp_path / "sae"), 4), "--ckpt_path", "last")
    sae, whole = fluxsae.load_sae(tmp_path / "sae"), fluxsae.load_sae(tmp_path / "whole")
    assert class_path(type(sae)) == kind == read_json(tmp_path / "sae" / "config.json")["class_path"]
    assert KINDS[kind].items() <= sae.options().items()
    # The schedule falls towards the last of a run's steps, so the two runs end alike, not to the bit.
    assert read_json(tmp_path / "sae" / "config.json")["training"]["held_out"]["fve"] > 0.3
    assert all(torch.allclose(a, b, atol=0.2) for a, b in zip(sae.parameters(), whole.parameters(), strict=True))
    _folds(sae, fluxsae.ShardSet.open(capture / "tokens").tokens(3))

    table, images = str(tmp_path / "features.csv"), str(capture / "images")
    callbacks = [
        {"class_path": "fluxsae.ScoresWriter", "init_args": {"folder": str(tmp_path / "scores")}},
        {"class_path": "fluxsae.AliveStatistics", "init_args": {"features": table}},
        {"class_path": "fluxsae.TopImages", "init_args": {"features": table, "n_images": 3}},
    ]
    callbacks[0]["init_args"]["prompts"] = str(capture / "prompts.jsonl")
    run(tmp_path, "predict", predict(capture, "fluxsae.SAEScoring", tmp_path / "sae", callbacks))
    scores = fluxsae.Scores.open(tmp_path / "scores").matrix
    tokens = torch.stack([fluxsae.ShardSet.open(capture / "tokens").tokens(i) for i in range(2 * PROMPTS)])
    assert np.allclose(scores, sae.encode(tokens).amax(dim=1), atol=1e-5)

    select = {"table": table, "rank_by": "max", "n_features": 3, "n_images": 3}
    overlays = {"folder": str(tmp_path / "overlays"), "images": images, "select": select}
    drawn = [{"class_path": "fluxsae.Overlays", "init_args": overlays}]
    run(tmp_path, "predict", predict(capture, "fluxsae.FeatureMapping", tmp_path / "sae", drawn))
    assert len(list((tmp_path / "overlays").glob("feature-*.png"))) == 3
    _steers(sae, tiny_pipe, fluxsae.Selection(Path(table), rank_by="max", n_features=1).rows()[0].feature)
    with pytest.raises(ValueError, match="do not train apart from each other"):
        refuse_unshardable(sae, 2)
    assert why_not_fused(sae, RunFacts("bf16-mixed")) == f"it is a {type(sae).__name__} and only L1 and TopK have one"


def _folds(sae: SAE, tokens: torch.Tensor) -> None:
    folded = sae.fold()
    assert float(folded.scale) == 1 and float(folded.mean.abs().sum()) == 0
    assert torch.allclose(folded.encode(tokens), sae.encode(tokens), atol=1e-4)
    assert torch.allclose(folded(tokens), sae(tokens), atol=1e-4)


def _steers(sae: SAE, pipe: FluxPipeline, feature: int) -> None:
    settings: dict[str, Any] = {
        "height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 8, "output_type": "np",
    }  # fmt: skip
    seed = torch.Generator().manual_seed(0)
    plain = pipe(["a fox"], generator=seed, **settings).images
    found = []
    for edit in ({"add": {feature: 3.0}}, {"clamp": {feature: 5.0}}, {"add": {feature: 0.0}}):
        with fluxsae.intervene(pipe, sae, **edit):
            found.append(pipe(["a fox"], generator=torch.Generator().manual_seed(0), **settings).images)
    assert [bool((image != plain).any()) for image in found] == [True, True, False]


def test_kinds_train_side_by_side_in_a_sweep(capture: Path, tmp_path: Path) -> None:
    members = {kind.split(".")[-1]: training(kind, tmp_path / kind) for kind in KINDS}
    sweep = {"class_path": "fluxsae.SweepTraining", "init_args": {"members": members}}
    run(tmp_path, "fit", fit(capture, sweep, 2))
    for kind in KINDS:
        run(tmp_path, "fit", fit(capture, training(kind, tmp_path / "alone" / kind), 2))
        one, alone = fluxsae.load_sae(tmp_path / kind), fluxsae.load_sae(tmp_path / "alone" / kind)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one.parameters(), alone.parameters(), strict=True))


def test_another_process_finds_a_kind_by_its_class_path(tmp_path: Path) -> None:
    sae = randomised(SoftThreshold(8, 20, margin=0.3))
    fluxsae.save_sae(tmp_path / "sae", sae)
    code = f"import fluxsae; sae = fluxsae.load_sae({str(tmp_path / 'sae')!r}); print(type(sae).__name__, sae.margin)"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["SoftThreshold", "0.3"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nothing_here.Kind", "install the package that has it"),
        ("fluxsae.Nothing", "has no attribute 'Nothing'"),
        ("fluxsae.Scores", "no kind of SAE, which are subclasses of fluxsae.SAE"),
        ("antigravity.Kind", "is in Python's own library"),
        ("os.system; import x", "is no class path"),
        ("TopK", "is no class path"),
    ],
)
def test_what_is_no_kind_is_refused(path: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        find_kind(path)
    fluxsae.save_sae(tmp_path, TopK(8, 20, 3))
    config = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({**config, "class_path": path}))
    with pytest.raises(ValueError, match=r"config\.json does not describe an SAE"):
        fluxsae.load_sae(tmp_path)


def test_a_kind_that_no_one_could_load_is_refused_before_it_is_saved(tmp_path: Path) -> None:
    class Local(SoftThreshold):
        """Of this function only."""

    with pytest.raises(ValueError, match="another process cannot import; move the class to the top level"):
        fluxsae.save_sae(tmp_path / "sae", Local(8, 20))
    assert not (tmp_path / "sae").exists()


class Halved(TopK):
    """A TopK that computes something else, and says nothing of what it can do."""

    def activate(self, pre_acts: torch.Tensor) -> torch.Tensor:
        return super().activate(pre_acts) / 2


def test_a_subclass_has_none_of_its_parents_kernels() -> None:
    sae = Halved(8, 20, 3)
    assert all(getattr(sae, form)() is None for form in CAPABILITIES)
    assert all(getattr(TopK(8, 20, 3), form)() is not None for form in ("top_k_form", "fused_form", "sharded_form"))
    assert type(pooling_of(sae, "bf16-mixed")) is PlainPooling
    assert sae.expected_l0 == 3  # what no kernel depends on is inherited
    x = torch.randn(5, 8)
    assert torch.equal(sae.encode(x), TopK(8, 20, 3).activate(sae.pre_acts(x)) / 2)
    assert int((sae.encode(x) > 0).sum(dim=1).max()) <= 3 and len(largest(sae.pre_acts(x), 3)) == 5


def test_what_kinds_can_do_is_listed() -> None:
    assert kinds_with("fused_form") == ["L1", "TopK"]
    assert {"L1", "JumpReLU", "TopK"} == set(kinds_with("sharded_form"))
