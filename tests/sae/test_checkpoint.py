"""SAEs on disk: ours, and checkpoints of `model_state_dict` and `config`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxsae.files.json_files import read_json, write_json
from fluxsae.sae import L1, SAE, BatchTopK, JumpReLU, TopK, load_sae, save_sae
from fluxsae.sae.checkpoint import read_config
from tests.synthetic import capture_spec, randomised

KINDS = [
    L1(8, 20, l1=0.7),
    TopK(8, 20, 3),
    BatchTopK(8, 20, 3, seed=4),
    JumpReLU(8, 20, 0.5, target_l0=4.5, threshold=0.2, bandwidth=0.3),
    TopK(8, 20, 3, groups=[5, 20]),
]


@pytest.mark.parametrize("sae", KINDS)
def test_a_saved_sae_is_the_same_sae(tmp_path: Path, sae: SAE) -> None:
    randomised(sae)
    sae.spec, sae.mean_norm = capture_spec(), 3.25
    save_sae(tmp_path, sae, {"steps": 5})
    loaded = load_sae(tmp_path)
    assert not loaded.W_dec.requires_grad and not loaded.training
    assert type(loaded) is type(sae) and loaded.options() == sae.options()
    assert loaded.spec == capture_spec() and loaded.mean_norm == 3.25 and not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in sae.state_dict().items())
    assert read_config(tmp_path)["training"] == {"steps": 5}


@pytest.mark.parametrize("sae", [BatchTopK(8, 20, 3), JumpReLU(8, 20)])
def test_thresholds_are_saved(tmp_path: Path, sae: BatchTopK | JumpReLU) -> None:
    with torch.no_grad():
        (sae.log_threshold if isinstance(sae, JumpReLU) else sae.threshold).fill_(0.05)
    save_sae(tmp_path, sae)
    x = torch.randn(30, 8)
    codes = load_sae(tmp_path).encode(x)
    assert torch.equal(codes, sae.encode(x)) and float(codes[codes > 0].min()) > 0.05


def test_what_was_saved_before_there_were_groups_loads(tmp_path: Path) -> None:
    save_sae(tmp_path, TopK(8, 20, 3))
    path = tmp_path / "config.json"
    config = read_json(path)
    config["options"] = {"k": 3}
    write_json(path, config)
    assert load_sae(tmp_path).options() == TopK(8, 20, 3).options()


def test_a_folder_half_written_is_no_sae(tmp_path: Path) -> None:
    save_sae(tmp_path, TopK(8, 20, 3))
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="there is no SAE at"):
        load_sae(tmp_path)


def test_damage_names_the_file(tmp_path: Path) -> None:
    save_sae(tmp_path, TopK(8, 20, 3))
    weights = tmp_path / "sae.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"sae\.safetensors does not hold"):
        load_sae(tmp_path)
    weights.write_bytes(whole)
    config = (tmp_path / "config.json").read_text()
    for text, message in (
        (config.replace('"d_in": 8', '"d_in": 9'), r"sae\.safetensors does not hold"),
        (config.replace("TopK", "Other"), r"config\.json does not describe an SAE"),
        (config.replace('"version": 1', '"version": 7'), "format version 7"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_sae(tmp_path)


def state_dict_checkpoint(path: Path, **config: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "pre_bias": torch.randn(6, generator=generator),
        "encoder.weight": torch.randn(12, 6, generator=generator),
        "encoder.bias": torch.randn(12, generator=generator),
        "decoder.weight": torch.randn(6, 12, generator=generator),
    }
    torch.save({"model_state_dict": weights, "config": {"input_dim": 6, "hidden_dim": 12, **config}}, path)
    return weights


@pytest.mark.parametrize("use_topk", [True, False])
def test_a_checkpoint_of_a_state_dict_computes_what_its_weights_say(tmp_path: Path, use_topk: bool) -> None:
    w = state_dict_checkpoint(tmp_path / "checkpoint.pt", use_topk=use_topk, topk_k=3)
    sae = load_sae(tmp_path / "checkpoint.pt")
    x = torch.randn(10, 6)
    pre = (x - w["pre_bias"]) @ w["encoder.weight"].T + w["encoder.bias"]
    codes = pre.relu()
    if use_topk:
        values, indices = pre.topk(3, dim=1)
        codes = torch.zeros_like(pre).scatter(1, indices, values.relu())
    assert isinstance(sae, TopK if use_topk else L1) and sae.spec is None
    assert torch.allclose(sae.encode(x), codes, atol=1e-5)
    assert torch.allclose(sae(x), codes @ w["decoder.weight"].T + w["pre_bias"], atol=1e-5)


def test_an_l1_checkpoint_needs_no_k(tmp_path: Path) -> None:
    state_dict_checkpoint(tmp_path / "checkpoint.pt", use_topk=False)
    assert isinstance(load_sae(tmp_path / "checkpoint.pt"), L1)


def test_what_is_no_such_checkpoint_says_what_is_missing(tmp_path: Path) -> None:
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"is no checkpoint of an SAE .*model_state_dict"):
        load_sae(tmp_path / "other.pt")
    (tmp_path / "noise.pt").write_bytes(b"no checkpoint at all")
    with pytest.raises(ValueError, match="damaged or holds code"):
        load_sae(tmp_path / "noise.pt")


class Poison:
    """Runs a command when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_a_poisoned_checkpoint_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"model_state_dict": {}, "config": Poison(marker)}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="holds code, which is never run"):
        load_sae(tmp_path / "checkpoint.pt")
    assert not marker.exists()
