"""The fused step is a folder that can be deleted: in a copy of the package without it, everything else works."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

PROGRAM = """
import importlib, pkgutil, sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

import fluxsae
from tests.synthetic import token_shards

folder = Path(sys.argv[1])
assert Path(fluxsae.__file__).parents[1] == folder, fluxsae.__file__
for module in pkgutil.walk_packages(fluxsae.__path__, "fluxsae."):
    if module.name != "fluxsae.__main__":
        importlib.import_module(module.name)
assert not [name for name in sys.modules if "steps.fused" in name]

quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
data = fluxsae.ActivationData(token_shards(folder / "tokens", 8, 1, size=32).folder, batch_size=8)
for sae in (fluxsae.TopK(16, 24, 3), fluxsae.L1(16, 24)):
    trainer = Trainer(accelerator="cpu", max_epochs=1, log_every_n_steps=1, **quiet)
    trainer.fit(fluxsae.SAETraining(sae, folder / "sae"), data)
    assert type(fluxsae.load_sae(folder / "sae")) is type(sae)
with pytest.raises(ValueError, match="fused is true, but hand-made steps are not installed; leave fused out"):
    training = fluxsae.SAETraining(fluxsae.TopK(16, 24, 3), folder / "asked", fused=True)
    Trainer(accelerator="cpu", max_epochs=1, **quiet).fit(training, data)
callbacks = [fluxsae.AliveStatistics(folder / "features.csv")]
Trainer(accelerator="cpu", callbacks=callbacks, **quiet).predict(fluxsae.SAEScoring(folder / "sae"), data)
assert len(fluxsae.read_features(folder / "features.csv")) == 24
"""


def test_everything_else_works_without_the_fused_step(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("fused", "__pycache__")
    shutil.copytree(ROOT / "fluxsae", tmp_path / "fluxsae", ignore=ignored)
    (tmp_path / "tests").mkdir()
    for name in ("__init__.py", "synthetic.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    assert not (tmp_path / "fluxsae" / "training" / "steps" / "fused").exists()
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
