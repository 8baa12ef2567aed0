"""Several processes train the SAE that one process trains, whether they share the tokens or the features."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.strategies import ModelParallelStrategy

from fluxsae.cli.trainer import TrainerCLI
from fluxsae.data.activations import ActivationData
from fluxsae.runtime.distributed import OneAllReduce
from fluxsae.sae.checkpoint import load_sae, read_config
from tests.several import BATCH, D_IN, FEW, N_FEATURES, SlicedData, fit
from tests.synthetic import token_shards

CONFIGS = Path(__file__).parents[2] / "configs"

SCRIPT = """
import sys
from pathlib import Path
from jaxtyping import install_import_hook
if __name__ == "__main__":
    with install_import_hook("fluxsae", "beartype.beartype"):
        from fluxsae.data.activations import ActivationData
        from tests.several import BATCH, FEW, Collectives, SlicedData, Stop, fit, sharing_features, sharing_tokens
    folder = Path(sys.argv[1])
    shards = folder / "tokens"
"""
SHARE_TOKENS = """
    for kind in ("TopK", "L1"):
        fit(kind, folder / kind, SlicedData(), Collectives(folder / f"{kind}.json"), **sharing_tokens())
    fit("TopK", folder / "bf16", SlicedData(), **sharing_tokens(compress=True))
"""
SHARE_TOKENS_FUSED = """
    fit("L1", folder / "L1", SlicedData(FEW), fused=True, n_steps=5, **sharing_tokens(compress=True))
    for n_steps in (2, 5):
        how = sharing_tokens(compress=True)
        fit("TopK", folder / "TopK", SlicedData(FEW), fused=True, n_steps=n_steps, resume=n_steps > 2, **how)
    for fused in (True, False):
        name = f"uneven, {fused}"
        fit("TopK", folder / name, SlicedData(FEW, lead=3), fused=fused, n_steps=4, **sharing_tokens(compress=fused))
"""
SHARE_FEATURES = """
    for kind in ("TopK", "L1", "JumpReLU"):
        fit(kind, folder / kind, ActivationData(shards, BATCH), **sharing_features())
    fit("TopK", folder / "resumed", ActivationData(shards, BATCH), Stop(), **sharing_features())
    fit("TopK", folder / "resumed", ActivationData(shards, BATCH), resume=True, **sharing_features())
"""
SHARE_BOTH = """
    fit("TopK", folder / "TopK", SlicedData(), **sharing_features(n_groups=2))
"""


def run_in_several(folder: Path, trainings: str, timeout: float = 200) -> None:
    """Run the trainings in as many processes as they ask for; shapes are checked there, too."""
    script = folder / "several.py"
    script.write_text(SCRIPT + trainings)
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "PATH": ""}
    environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_alike(found: Path, expected: Path, tolerance: float = 1e-6) -> None:
    one, several = load_sae(expected), load_sae(found)
    assert type(several) is type(one) and several.options() == one.options()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(several.state_dict()[name], value, rtol=0, atol=tolerance)
    said, same = read_config(found)["training"], read_config(expected)["training"]
    assert said.pop("held_out") == pytest.approx(same.pop("held_out"), rel=max(1e-5, tolerance))
    assert said == same


@pytest.mark.parametrize("name", ["ddp", "tensor-parallel"])
def test_a_training_s_config_takes_several_gpus_from_another(name: str) -> None:
    files = ["-c", str(CONFIGS / "tiny" / "topk.yaml"), "-c", str(CONFIGS / f"{name}.yaml")]
    trainer = TrainerCLI.start("fit", [*files, "--trainer.accelerator=cpu", "--trainer.devices=2"], run=False).trainer
    assert isinstance(trainer.strategy, (OneAllReduce, ModelParallelStrategy))
    assert (trainer.num_devices, trainer.max_epochs) == (2, 30)


@pytest.mark.slow
def test_processes_that_share_tokens_train_one_processs_sae(tmp_path: Path) -> None:
    run_in_several(tmp_path, SHARE_TOKENS)
    for kind in ("TopK", "L1"):
        fit(kind, tmp_path / "one" / kind, SlicedData())
        assert_alike(tmp_path / kind, tmp_path / "one" / kind)
        # All gradients, which features fired, and the mean length of errors: nothing else, and no barrier.
        assert json.loads((tmp_path / f"{kind}.json").read_text()) == {"c10d::allreduce_": 3}
    assert_alike(tmp_path / "bf16", tmp_path / "one" / "TopK", tolerance=0.02)


@pytest.mark.slow
def test_fused_steps_of_processes_that_share_tokens_are_one_processs(tmp_path: Path) -> None:
    """By kernels, with AuxK at work, beside autograd's in one process; where shares are uneven, in as many.

    TopK's is resumed: a checkpoint has what each process alone knows of its features.
    """
    pytest.importorskip("triton")
    run_in_several(tmp_path, SHARE_TOKENS_FUSED, timeout=600)  # an interpreter is slow
    fit("L1", tmp_path / "one" / "L1", SlicedData(FEW), fused=False, n_steps=5)
    for n_steps in (2, 5):
        fit("TopK", tmp_path / "one" / "TopK", SlicedData(FEW), fused=False, n_steps=n_steps, resume=n_steps > 2)
    pairs = [("TopK", "one/TopK"), ("L1", "one/L1"), ("uneven, True", "uneven, False")]
    for name, reference in pairs:
        found, expected = (load_sae(tmp_path / folder).state_dict() for folder in (name, reference))
        for weight, value in expected.items():
            torch.testing.assert_close(found[weight], value, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_processes_that_share_features_train_one_processs_sae(tmp_path: Path) -> None:
    shards = token_shards(tmp_path / "tokens", 40, 2, size=128).folder
    run_in_several(tmp_path, SHARE_FEATURES)
    for kind in ("TopK", "L1", "JumpReLU"):
        fit(kind, tmp_path / "one" / kind, ActivationData(shards, BATCH))
        assert_alike(tmp_path / kind, tmp_path / "one" / kind)
    assert_alike(tmp_path / "resumed", tmp_path / "TopK")


@pytest.mark.slow
def test_processes_that_share_both_train_one_processs_sae(tmp_path: Path) -> None:
    run_in_several(tmp_path, SHARE_BOTH)
    fit("TopK", tmp_path / "one", SlicedData())
    assert_alike(tmp_path / "TopK", tmp_path / "one")


@pytest.mark.slow
def test_a_signal_to_the_first_process_ends_a_training_in_several(tmp_path: Path) -> None:
    shards = token_shards(tmp_path / "tokens", 40, 2, size=128).folder
    config = yaml.safe_load((CONFIGS / "tiny" / "topk.yaml").read_text())
    config["model"]["init_args"]["folder"] = str(tmp_path / "sae")
    config["model"]["init_args"]["sae"]["init_args"] = {"d_in": D_IN, "n_features": N_FEATURES, "k": 4}
    config["data"]["init_args"] = {"shards": str(shards), "batch_size": BATCH}
    saving = {"dirpath": str(tmp_path / "checkpoints"), "every_n_steps": 20}
    config["trainer"]["callbacks"][0]["init_args"] |= saving
    strategy = {"class_path": "fluxsae.runtime.distributed.OneAllReduce"}
    config["trainer"] |= {"devices": 2, "strategy": strategy, "max_epochs": 10**6, "logger": False}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "fluxsae", "fit", "-c", str(tmp_path / "fit.yaml")]
    with (tmp_path / "log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    while not (tmp_path / "checkpoints" / "last.ckpt").exists():
        assert child.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.1)
    child.terminate()
    assert child.wait(60) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()[-3000:]
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(child.pid, 0)
            time.sleep(0.1)
