"""Steering a random FLUX: which variants there are, what stays equal, and what is measured of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from fluxsae.capture.prompt_data import GenerationRequest, RequestBatch
from fluxsae.models.load import weights_identity
from fluxsae.records.spec import CaptureSpec, GenerationSpec, Grid
from fluxsae.sae.checkpoint import save_sae
from fluxsae.sae.kinds.topk import TopK
from fluxsae.steering.effects import ssim_distance, summarise
from fluxsae.steering.grids import grid
from fluxsae.steering.module import FluxSteering, Variant, read_mask

REQUESTS = [GenerationRequest(i, i, 0, 100 + i, f"a fox {i}") for i in range(2)]


@pytest.fixture(scope="module")
def sae_folder(tiny_flux: Path, tiny_pipe: FluxPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sae = TopK(32, 24, 24)
    generation = GenerationSpec(
        str(tiny_flux), weights_identity(tiny_flux), 64, 32, 3, 3.5, 1.0, 16, "float32", "hash", 1, 0
    )
    sae.spec, sae.mean_norm = CaptureSpec(generation, "transformer_blocks.1.ff", 1), 2.0
    folder: Path = tmp_path_factory.mktemp("sae")
    save_sae(folder, sae)
    return folder


def test_strength_0_is_the_unsteered_image_and_the_others_are_not(sae_folder: Path) -> None:
    module = FluxSteering(sae_folder, [3, 5], [0.0, 3.0], n_random=2)
    module.setup("test")
    steered = module.test_step(RequestBatch(REQUESTS, 0, True))
    assert steered.variants == [
        Variant("baseline", None, 0.0),
        *(
            variant
            for s in (0.0, 3.0)
            for variant in (
                Variant("feature", 3, s),
                Variant("feature", 5, s),
                Variant("random", None, s, 0),
                Variant("random", None, s, 1),
            )
        ),
    ]
    assert steered.activations.shape == (9, 2, 2)
    plain = [picture.tobytes() for picture in steered.images[0]]
    for variant, images, activations in zip(steered.variants, steered.images, steered.activations, strict=True):
        for i, picture in enumerate(images):  # every image of the batch is steered, or none is
            assert (picture.tobytes() == plain[i]) == (variant.strength == 0), variant
        assert torch.equal(activations, steered.activations[0]) == (variant.strength == 0)


@pytest.mark.parametrize(("mode", "still"), [("scale", 1.0), ("add", 0.0)])
def test_controls_follow_the_mode(sae_folder: Path, mode: str, still: float) -> None:
    module = FluxSteering(sae_folder, [3, 5], [still], mode=mode)  # type: ignore[arg-type]
    controls = [variant for variant in module.variants if variant.kind == "random"]
    assert [variant.feature for variant in controls] == ([None] if mode == "add" else [3, 5])
    module.setup("test")
    steered = module.test_step(RequestBatch(REQUESTS[:1], 0, True))
    assert len({images[0].tobytes() for images in steered.images}) == 1


def test_scaling_to_0_changes_the_image(sae_folder: Path) -> None:
    module = FluxSteering(sae_folder, [3], [0.0, -20.0], mode="scale", n_random=1)
    steered = module.test_step(RequestBatch(REQUESTS[:1], 0, True))
    assert not torch.equal(steered.activations[0], steered.activations[-1])


def test_what_does_not_fit_is_refused(sae_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 strengths"):
        FluxSteering(sae_folder, [3], [])
    with pytest.raises(ValueError, match="step 3 is beyond the schedule"):
        FluxSteering(sae_folder, [3], [1.0], last_step=3)
    with pytest.raises(ValueError, match="first_step 2 is after last_step 1"):
        FluxSteering(sae_folder, [3], [1.0], first_step=2, last_step=1)
    with pytest.raises(ValueError, match="feature 24 is not in this SAE"):
        FluxSteering(sae_folder, [24], [1.0]).setup("test")
    with pytest.raises(FileNotFoundError, match="no mask"):
        FluxSteering(sae_folder, [3], [1.0], mask=tmp_path / "mask.png")
    save_sae(tmp_path / "nameless", TopK(32, 24, 4))
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        FluxSteering(tmp_path / "nameless", [3], [1.0])


def test_other_weights_are_refused(sae_folder: Path, tmp_path: Path) -> None:
    from tests.random_flux import random_flux

    with pytest.raises(ValueError, match="holds other weights"):
        FluxSteering(sae_folder, [3], [1.0], model=str(random_flux(tmp_path / "other", seed=1))).setup("test")


def test_a_mask_is_the_brightness_of_each_patch(tmp_path: Path) -> None:
    pixels = np.zeros((64, 32), dtype=np.uint8)
    pixels[16:32, 16:] = 255
    pixels[48:, :8] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    expected = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.5, 0.0]])
    torch.testing.assert_close(read_mask(tmp_path / "mask.png", Grid(4, 2)), expected, atol=0.01, rtol=0)


def test_ssim_distance_is_0_for_equal_pictures_and_large_for_noise() -> None:
    rng = np.random.default_rng(0)
    one, other = (Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)) for _ in range(2))
    distance = ssim_distance([one, one], [one, other])
    assert float(distance[0]) == pytest.approx(0, abs=1e-6) and float(distance[1]) > 0.8


def test_the_summary_sets_feature_and_random_side_by_side() -> None:
    base = {"draw": 0, "ssim_distance": 0.1, "clip_distance": 0.0, "clip_change": None, "activation": 1.0}
    rows = [
        {**base, "feature": 7, "kind": kind, "strength": 2.0, "activation_change": change}
        for kind, change in (("feature", 1.0), ("feature", 3.0), ("random", 0.5))
    ]
    (summary,) = summarise(rows, {7: "object=fox"})
    assert (summary["feature"], summary["label"], summary["n_images"]) == (7, "object=fox", 2)
    assert (summary["feature_activation_change"], summary["random_activation_change"]) == (2.0, 0.5)
    assert summary["feature_clip_change"] is None


def test_a_grid_holds_every_picture() -> None:
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (9, 9, 9)], [(1, 2, 3), (4, 5, 6)]]
    rows = [[Image.new("RGB", (40, 24), colour) for colour in row] for row in colours]
    found = {colour for _, colour in grid(rows, ["a", "b"], ["x"] * 3).getcolors(1 << 24) or []}
    assert {colour for row in colours for colour in row} <= found
