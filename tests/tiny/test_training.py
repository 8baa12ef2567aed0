"""Every training of the bundled models steps, goes on exactly where it stopped, and exports what users load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL
from lightning.pytorch import Trainer

import fluxsae
from fluxsae.scoring.clip import load_clip
from scripts.tiny import data, training
from scripts.tiny.data import Pool, build_pool, tokenise
from scripts.tiny.export import export_clip, export_flux
from scripts.tiny.models import build_clip, build_vae, clip_text_of
from scripts.tiny.scenes import OBJECT_NAMES, render
from scripts.tiny.text import clip_tokenizer
from scripts.tiny.training import (
    CLIPTraining,
    FluxTraining,
    GuidanceDistillation,
    TextToVelocity,
    Training,
    VAETraining,
    encode_pool,
    measure_latents,
)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes a minute, and changes nothing but the time of a step."""
    monkeypatch.setattr(training, "compile_blocks", lambda model: None)


@pytest.fixture(scope="module")
def pool() -> Pool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CHUNK", 8)
        return build_pool(16, seed=3)


def autoencoder(pool: Pool) -> AutoencoderKL:
    untrained = build_vae().eval()
    measure_latents(untrained, pool, seed=1)
    return untrained


def vae(pool: Pool) -> VAETraining:
    return VAETraining(pool=pool, n_steps=4, batch_size=4, lr=1e-3, seed=1)


def clip(pool: Pool) -> CLIPTraining:
    return CLIPTraining(pool=pool, n_steps=4, batch_size=4, lr=1e-3, seed=1)


def flux(pool: Pool) -> FluxTraining:
    return FluxTraining(text_to_velocity(), **flux_options(pool))


def distillation(pool: Pool) -> GuidanceDistillation:
    return GuidanceDistillation(text_to_velocity(), **flux_options(pool))


def text_to_velocity() -> TextToVelocity:
    torch.manual_seed(7)
    return TextToVelocity(clip_text_of(build_clip(), clip_tokenizer()))


def flux_options(pool: Pool) -> dict[str, Any]:
    encoded = encode_pool(autoencoder(pool), pool, seed=1)
    return {
        "encoded": encoded,
        "empty": tokenise([""]),
        "pool": pool,
        "n_steps": 4,
        "batch_size": 8,
        "lr": 1e-3,
        "seed": 1,
    }


def trainer(folder: Path, n_steps: int) -> Trainer:
    return Trainer(
        max_steps=n_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def made(make: Callable[[Pool], Training], pool: Pool) -> Training:
    torch.manual_seed(0)
    return make(pool)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")  # it only counts
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")  # on purpose
@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training")  # the teacher
@pytest.mark.parametrize(
    ("make", "n_steps"), [(vae, 4), (clip, 2), (flux, 2), (distillation, 2)]
)  # 4: also whole images
def test_a_resumed_run_equals_an_unbroken_one(
    make: Callable[[Pool], Training], n_steps: int, pool: Pool, tmp_path: Path
) -> None:
    unbroken, broken, resumed = (made(make, pool) for _ in range(3))
    before = {name: value.clone() for name, value in unbroken.state_dict().items()}
    trainer(tmp_path, n_steps).fit(unbroken)
    changed = [name for name, p in unbroken.named_parameters() if p.requires_grad and not p.equal(before[name])]
    assert len(changed) > 10 and all(value.isfinite().all() for value in unbroken.state_dict().values())

    first = trainer(tmp_path, 1)
    first.fit(broken)
    first.save_checkpoint(tmp_path / "one.ckpt")
    trainer(tmp_path, n_steps).fit(resumed, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    torch.testing.assert_close(resumed.state_dict(), unbroken.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("make", [vae, clip])
def test_scenes_are_drawn_in_full_precision(
    make: Callable[[Pool], Training], pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, images = make(pool), []
    monkeypatch.setattr(module, "loss", lambda *inputs: images.append(inputs[0]))
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            module.training_step()
    assert torch.equal(*images)


def test_a_pool_is_the_same_however_it_is_built(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CHUNK", 8)
    again = build_pool(16, seed=3)
    assert torch.equal(again.t5_ids, pool.t5_ids) and torch.equal(again.scenes.objects, pool.scenes.objects)
    assert len(pool.t5_ids) == 16 and len(build_pool(9, seed=3).t5_ids) == 16  # whole chunks
    assert not torch.equal(build_pool(16, seed=4).t5_ids, pool.t5_ids)


def test_measured_latents_have_mean_0_and_variance_1(pool: Pool) -> None:
    latents = encode_pool(autoencoder(pool), pool, seed=1).tokens.float()
    assert latents.shape == (16, 64, 64)
    assert latents.mean().item() == pytest.approx(0, abs=1e-3) and latents.std().item() == pytest.approx(1, abs=1e-3)


def test_tokens_are_labelled_by_what_they_show(pool: Pool) -> None:
    encoded = encode_pool(autoencoder(pool), pool, seed=1, batch_size=16)
    masks = render(pool.scenes, torch.Generator().manual_seed(1)).masks
    for scene, (labels, coverage) in enumerate(zip(encoded.labels, encoded.coverage, strict=True)):
        objects = {index for index in pool.scenes.objects[scene].tolist() if index >= 0}
        assert set(labels.tolist()) == objects | {len(OBJECT_NAMES) + pool.scenes.background[scene].item()}
        assert coverage.float().max() <= 1 and labels[coverage > 0.31].lt(len(OBJECT_NAMES)).all()
        assert coverage.float().sum() == pytest.approx(masks[scene].sum().item() / 256, rel=0.05)


def test_clips_text_tower_is_the_same_in_transformers_form() -> None:
    clip = build_clip().eval()
    for p in clip.parameters():
        p.data += 0.02 * torch.randn_like(p)  # so that no bias is left at zero
    ids = tokenise(["a small fox on the left", "an orange, pink backdrop", ""])[1]
    with torch.no_grad():
        pooled = clip_text_of(clip, clip_tokenizer()).eval()(ids).pooler_output
        torch.testing.assert_close(pooled @ clip.text_projection, clip.encode_text(ids), rtol=1e-4, atol=1e-4)


def test_exported_flux_loads_and_draws(pool: Pool, tmp_path: Path) -> None:
    export_flux(autoencoder(pool), text_to_velocity(), clip_tokenizer(), tmp_path)
    pipe = fluxsae.load_pipeline(tmp_path)
    image = pipe("a small fox, blue background", num_inference_steps=1, max_sequence_length=32).images[0]
    assert image.size == (128, 128)


def test_exported_clip_loads_as_open_clip_loads_it(tmp_path: Path) -> None:
    model = build_clip().eval()
    export_clip(model, tmp_path)
    loaded = load_clip(f"local-dir:{tmp_path}").model
    texts = ["a small fox on the left", "an orange, pink backdrop"]
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(texts)
    assert torch.equal(tokens, tokenise(texts)[1])
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_text(tokens), model.encode_text(tokens), rtol=0.01, atol=0.02)
