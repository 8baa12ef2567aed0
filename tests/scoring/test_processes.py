"""Two processes leave the same files as one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from fluxsae.data.activations import ActivationData
from fluxsae.records.features import Selection
from fluxsae.sae.checkpoint import read_config
from tests.random_clip import random_clip
from tests.scoring.selectivity import Selectivity
from tests.scoring.study import Study, make_study, run

SCRIPT = """
import sys, warnings
from pathlib import Path
from tests.scoring.test_processes import score, study_at
if __name__ == "__main__":
    score(study_at(Path(sys.argv[1])), sys.argv[2], accelerator="cpu", devices=2, strategy="ddp", images_per_batch=4)
"""


def study_at(folder: Path) -> Study:
    from fluxsae.sae import load_sae
    from fluxsae.shards.read import ShardSet

    return Study(folder, ShardSet.open(folder / "tokens"), ShardSet.open(folder / "images"), load_sae(folder / "sae"))


def score(study: Study, name: str, **trainer: object) -> None:
    """Every scoring callback, then overlays, with results under `name`."""
    from fluxsae.scoring.analyses.alive import AliveStatistics
    from fluxsae.scoring.analyses.coherence import Coherence
    from fluxsae.scoring.analyses.overlays import Overlays
    from fluxsae.scoring.analyses.scores_writer import ScoresWriter
    from fluxsae.scoring.analyses.top_images import TopImages
    from fluxsae.scoring.maps import FeatureMapping

    out = study.folder / name
    table = out / "features.csv"
    clip = f"local-dir:{study.folder / 'clip'}"
    run(
        study,
        ScoresWriter(out / "scores"),
        AliveStatistics(table, min_images=1),
        TopImages(table, 4),
        Coherence(table, study.images.folder, clip, n_images=4, n_null=5),
        Selectivity(table),
        **trainer,
    )
    select = Selection(table, n_features=4, rank_by="max", n_images=3)
    run(study, Overlays(out / "overlays", study.images.folder, select), only=select, module=FeatureMapping, **trainer)


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    random_clip(tmp_path / "clip")
    score(study, "one")
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, script, tmp_path, "two"], env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = tmp_path / "one", tmp_path / "two"
    assert (one / "features.csv").read_text() == (two / "features.csv").read_text()
    assert (one / "overlays/overlays.csv").read_text() == (two / "overlays/overlays.csv").read_text()
    assert np.array_equal(np.load(one / "scores/matrix.npy"), np.load(two / "scores/matrix.npy"))


@pytest.mark.slow
def test_two_processes_train_one_sae(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    config = {
        "model": {
            "class_path": "fluxsae.SAETraining",
            "init_args": {
                "sae": {
                    "class_path": "fluxsae.TopK",
                    "init_args": {"d_in": study.sae.d_in, "n_features": 24, "k": 4},
                },
                "folder": str(tmp_path / "two"),
            },
        },
        "data": {
            "class_path": "fluxsae.ActivationData",
            "init_args": {"shards": str(study.tokens.folder), "batch_size": 32, "val_fraction": 0.4},
        },
        "trainer": {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 2},
    }
    config["trainer"] |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "fluxsae", "fit", "-c", tmp_path / "fit.yaml"], cwd=tmp_path,
        env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sync_dist" not in done.stderr
    held_out = read_config(tmp_path / "two")["training"]["held_out"]
    data = ActivationData(study.tokens.folder, val_fraction=0.4)
    assert held_out["n_tokens"] == len(data.split.held_out) * data.spec.n_tokens  # every process's share
