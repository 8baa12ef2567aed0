"""Every training of the bundled models steps, goes on exactly where it stopped, and exports what users load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL
from lightning.pytorch import Trainer

import fluxsae
from fluxsae.analysis.clip import load_clip
from scripts.tiny import data
from scripts.tiny.data import Pool, build_pool, tokenise
from scripts.tiny.export import export_clip, export_flux
from scripts.tiny.models import build_clip, build_vae
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
    options = {"pool": pool, "n_steps": 4, "batch_size": 8, "lr": 1e-3, "seed": 1}
    return FluxTraining(empty=tokenise([""]), vae=autoencoder(pool), **options)


def distillation(pool: Pool) -> GuidanceDistillation:
    options = {"pool": pool, "n_steps": 4, "batch_size": 8, "lr": 1e-3, "seed": 1}
    torch.manual_seed(7)
    return GuidanceDistillation(TextToVelocity(), empty=tokenise([""]), vae=autoencoder(pool), **options)


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


def test_a_pool_is_the_same_however_it_is_built(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CHUNK", 8)
    again = build_pool(16, seed=3)
    assert torch.equal(again.t5_ids, pool.t5_ids) and torch.equal(again.scenes.objects, pool.scenes.objects)
    assert len(pool.t5_ids) == 16 and len(build_pool(9, seed=3).t5_ids) == 16  # whole chunks
    assert not torch.equal(build_pool(16, seed=4).t5_ids, pool.t5_ids)


def test_measured_latents_have_mean_0_and_variance_1(pool: Pool) -> None:
    latents = encode_pool(autoencoder(pool), pool, seed=1)
    assert latents.shape == (16, 64, 64)
    assert latents.mean().item() == pytest.approx(0, abs=1e-3) and latents.std().item() == pytest.approx(1, abs=1e-3)


def test_exported_flux_loads_and_draws(pool: Pool, tmp_path: Path) -> None:
    export_flux(autoencoder(pool), TextToVelocity(), tmp_path)
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
