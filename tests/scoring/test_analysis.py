"""An analysis from outside the package works from a config, and what it fills in is used like any other column."""

from __future__ import annotations

import inspect
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningModule, Trainer

from fluxsae.cli.command import main
from fluxsae.files.tables import read_csv
from fluxsae.records.columns import Column
from fluxsae.records.features import Selection, read_features, read_table, update_features
from fluxsae.scoring.analyses.alive import AliveStatistics
from fluxsae.scoring.analyses.coherence import Coherence
from fluxsae.scoring.analyses.overlays import Overlays
from fluxsae.scoring.analyses.top_images import TopImages
from fluxsae.scoring.analysis import FeatureAnalysis
from fluxsae.scoring.maps import FeatureMapping
from fluxsae.scoring.module import ImageScores
from fluxsae.steering.module import FluxSteering
from tests.random_clip import random_clip
from tests.scoring.selectivity import Selectivity
from tests.scoring.study import Study, all_scores, make_study, run


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path)


def command(study: Study, verb: str, name: str, values: dict[str, Any]) -> int:
    """Run a config by `fluxsae`, in this process."""
    path = study.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # a user's warnings do not stop a run
        return main([verb, "-c", str(path)])


def predict(study: Study, name: str, model: str, callbacks: dict[str, dict[str, Any]], **data: Any) -> int:
    inputs = {"shards": str(study.tokens.folder), "images_per_batch": 5, **data}
    named = [{"class_path": path, "init_args": arguments} for path, arguments in callbacks.items()]
    return command(study, "predict", name, {
        "model": {"class_path": model, "init_args": {"sae": str(study.folder / "sae")}},
        "data": {"class_path": "fluxsae.ActivationData", "init_args": inputs},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "callbacks": named},
    })  # fmt: skip


def test_a_class_path_is_all_that_it_takes(study: Study) -> None:
    table = str(study.features)
    analyses = {
        name: {"features": table}
        for name in ("fluxsae.AliveStatistics", "fluxsae.TopImages", "tests.scoring.selectivity.Selectivity")
    }
    assert predict(study, "scores", "fluxsae.SAEScoring", analyses) == 0
    scores = all_scores(study)
    expected = 1 - scores.mean(dim=0).square() / scores.square().mean(dim=0)
    rows = read_features(study.features)
    known = [(row["selectivity"], float(expected[row.feature])) for row in rows if row["selectivity"] is not None]
    assert known and [a for a, _ in known] == pytest.approx([b for _, b in known], abs=1e-4)
    assert [row["selectivity"] is None for row in rows] == expected.isnan().tolist()
    assert read_table(study.features).columns["selectivity"].meaning == "1 - mean(S)² / mean(S²) over images"

    select = {"table": table, "rank_by": "selectivity", "n_features": 3, "n_images": 4}
    chosen = [row.feature for row in Selection(**{**select, "table": study.features}).rows()]
    alive = [row for row in rows if row.alive]
    assert chosen == [row.feature for row in sorted(alive, key=lambda row: (-row["selectivity"], row.feature))[:3]]

    images, overlays = str(study.images.folder), str(study.folder / "overlays")
    drawing = {"fluxsae.Overlays": {"folder": overlays, "images": images, "select": select}}
    assert predict(study, "overlays", "fluxsae.FeatureMapping", drawing, only=select) == 0
    figures = {"folder": str(study.folder / "figures"), "select": select, "images": images, "overlays": overlays}
    assert command(study, "figures", "figures", figures) == 0
    sheet = read_csv(study.folder / "figures" / "contact_sheet.csv")
    assert [int(row["feature"]) for row in sheet] == chosen
    assert [float(row["selectivity"]) for row in sheet] == [rows[feature]["selectivity"] for feature in chosen]
    selection = Selection(study.features, 3, "selectivity")
    assert FluxSteering(study.folder / "sae", selection, [1.0]).features == chosen


def test_the_example_in_the_class_is_the_one_that_runs() -> None:
    example = (inspect.getdoc(FeatureAnalysis) or "").split("```")[1].removeprefix("python\n")
    assert textwrap.dedent(example).strip() == inspect.getsource(Selectivity).strip()


def test_the_order_of_analyses_does_not_matter(study: Study) -> None:
    clip = random_clip(study.folder / "clip")
    tables = []
    for order in (1, -1):
        study.features.unlink(missing_ok=True)
        analyses = [
            AliveStatistics(study.features),
            TopImages(study.features, 6),
            Coherence(study.features, study.images.folder, clip, n_images=4, n_null=5),
            Selectivity(study.features),
        ]
        run(study, *analyses[::order])
        tables.append((study.features.read_text(), study.features.with_suffix(".json").read_text()))
    assert tables[0] == tables[1]


class Wrong(FeatureAnalysis):
    columns = (Column("right", "int", "of a test"),)

    def __init__(self, features: Path, found: Mapping[str, Sequence[Any]]) -> None:
        super().__init__(features)
        self.found = found

    def finish(self, trainer: Trainer) -> Mapping[str, Sequence[Any]]:
        return self.found


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"left": [1] * 24}, "Wrong fills in column 'left' but declares right; add a Column"),
        ({"right": [1] * 23}, "23 values for column 'right'; give one for each of the 24 features"),
        ({"right": [0.5] * 24}, "'right' is declared as int but has the float 0.5"),
    ],
)
def test_what_was_not_declared_is_refused(study: Study, found: Mapping[str, Sequence[Any]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(study, Wrong(study.features, found))
    assert not study.features.exists()


def test_an_analysis_without_results_leaves_no_table(study: Study) -> None:
    run(study, Wrong(study.features, {}))
    assert not study.features.exists()


def test_scores_and_maps_have_modules_of_their_own(study: Study) -> None:
    with pytest.raises(ValueError, match=r"TopImages reads scores, which FeatureMapping does not make; .*SAEScoring"):
        run(study, TopImages(study.features), module=FeatureMapping)
    update_features(study.features, {"alive": [True] * 24, "max": [1.0] * 24, "top_images": ["0"] * 24})
    only = Selection(study.features, rank_by="max")
    with pytest.raises(ValueError, match=r"`only` is set; .*fluxsae\.FeatureMapping"):
        run(study, TopImages(study.features), only=only)


@pytest.mark.parametrize("old", ["fluxsae.SAEScoring", "fluxsae.scoring.SAEScoring"])
def test_overlays_of_the_first_edition_s_config_are_the_same(study: Study, old: str) -> None:
    run(study, AliveStatistics(study.features), TopImages(study.features, 4))
    only = {"table": str(study.features), "rank_by": "max", "n_features": 3, "n_images": 4}
    left = []
    for name, model in (("old", old), ("new", "fluxsae.FeatureMapping")):
        folder = study.folder / name
        drawing = {"fluxsae.Overlays": {"folder": str(folder), "images": str(study.images.folder), "select": only}}
        assert predict(study, name, model, drawing, only=only) == 0
        left.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert left[0] == left[1] and "maps.npy" in left[0]


def test_maps_need_a_module_that_reads_codes(study: Study) -> None:
    update_features(study.features, {"alive": [True] * 24, "max": [1.0] * 24, "top_images": ["0"] * 24})
    overlays = Overlays(study.folder / "overlays", study.images.folder, Selection(study.features, rank_by="max"))
    with pytest.raises(ValueError, match=r"Overlays maps codes, which LightningModule does not read; .*FeatureMapping"):
        overlays.on_predict_start(Trainer(logger=False, accelerator="cpu"), LightningModule())


def test_scores_reach_every_analysis(study: Study) -> None:
    class Counts(Wrong):
        def update(self, batch: ImageScores) -> None:
            seen.extend(batch.images.tolist())

    seen: list[int] = []
    run(study, Counts(study.features, {}), Counts(study.features, {}))
    assert sorted(seen) == sorted([*range(24)] * 2)
