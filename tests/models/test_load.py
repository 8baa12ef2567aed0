"""Loading a FLUX, from where it is and from where it is not."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import FluxPipeline

from fluxsae.models.load import load_frame, load_pipeline, model_folder, transformer_skeleton, weights_identity


def test_the_pipeline_of_a_folder(tiny_flux: Path, tiny_pipe: FluxPipeline) -> None:
    assert tiny_pipe.transformer.dtype == torch.float32
    assert tiny_pipe("a fox", num_inference_steps=1, max_sequence_length=16).images[0].size == (64, 64)
    assert not any(p.requires_grad for p in tiny_pipe.transformer.parameters())
    assert load_pipeline(tiny_flux, dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def test_weights_begin_where_pytorchs_own_memory_would(tiny_pipe: FluxPipeline) -> None:
    parts = (tiny_pipe.transformer, tiny_pipe.vae, tiny_pipe.text_encoder, tiny_pipe.text_encoder_2)
    assert all(weight.data_ptr() % 64 == 0 for part in parts for weight in part.parameters())


def test_the_frame_and_the_skeleton_hold_no_weights(tiny_flux: Path) -> None:
    frame = load_frame(tiny_flux)
    assert frame.transformer is None and frame.tokenizer_2.model_max_length == 16
    assert all(p.device.type == "meta" for p in transformer_skeleton(tiny_flux).parameters())


@pytest.mark.parametrize("model", ["./absent", "/absent/flux", "absent", "a/b/c", "~/absent"])
def test_a_missing_folder_is_never_asked_of_the_hub(model: str) -> None:
    with (
        mock.patch.object(FluxPipeline, "download", side_effect=AssertionError),
        pytest.raises(FileNotFoundError, match=r"there is no folder .*; name a diffusers pipeline folder"),
    ):
        load_pipeline(model)


def test_a_missing_folder_under_one_that_exists_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no folder checkpoints/absent"):
        model_folder("checkpoints/absent")


def test_a_hub_id_is_the_folder_of_its_files(tiny_flux: Path) -> None:
    with mock.patch.object(FluxPipeline, "download", return_value=str(tiny_flux)) as download:
        assert load_frame("black-forest-labs/FLUX.1-dev").scheduler.config.use_dynamic_shifting
        assert weights_identity("black-forest-labs/FLUX.1-dev") == weights_identity(tiny_flux)
    assert {call.args[0] for call in download.call_args_list} == {"black-forest-labs/FLUX.1-dev"}


def test_a_hub_that_has_no_such_model() -> None:
    with (
        mock.patch.object(FluxPipeline, "download", side_effect=OSError("a page of advice")),
        pytest.raises(FileNotFoundError, match=r"'nobody/absent' is no folder here, and the hub gave no such model"),
    ):
        load_pipeline("nobody/absent")


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no model_index.json"):
        load_pipeline(tmp_path)


def test_the_identity_of_weights(tiny_flux: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_flux, tmp_path / "copy"))
    assert weights_identity(copy) == weights_identity(tiny_flux)
    weights = next((copy / "vae").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert weights_identity(copy) != weights_identity(tiny_flux)
