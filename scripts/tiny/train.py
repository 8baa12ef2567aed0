"""Train the bundled models, from nothing, in order: `python -m scripts.tiny.train --work runs/tiny-training`.

Each stage saves as it goes and, started again, goes on where it stopped; a finished stage is not run again. It takes
one GPU, and prints the seconds of each stage, which the model cards quote.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import torch
from diffusers import AutoencoderKL
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_model, save_model
from torch import nn

from scripts.tiny.data import Pool, build_pool, tokenise
from scripts.tiny.export import export_clip, export_flux
from scripts.tiny.models import build_clip, build_vae
from scripts.tiny.scenes import render
from scripts.tiny.training import (
    CLIPTraining,
    FluxTraining,
    GuidanceDistillation,
    TextToVelocity,
    Training,
    VAETraining,
    measure_latents,
)

SEED = 20


def main() -> None:
    options = parse()
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward gives NaN at head width 32 in bf16
    L.seed_everything(SEED, verbose=False)
    pool = build_pool(options.scenes, SEED, n_processes=min(16, os.cpu_count() or 1))
    common = {"pool": pool, "seed": SEED, "graphs": not options.no_graphs}

    vae = build_vae()
    vae_steps = partial(VAETraining, n_steps=options.vae_steps, batch_size=options.batch // 3, lr=2e-3, **common)
    stage("vae", vae, vae_steps, options)
    vae.eval().to(options.device)
    measure_latents(vae, pool, SEED)
    print(f"vae: held-out scenes at {psnr(vae, build_pool(1000, SEED + 1)):.2f} dB", flush=True)

    clip = build_clip()
    clip_steps = partial(CLIPTraining, n_steps=options.clip_steps, batch_size=options.batch, lr=1e-3, **common)
    stage("clip", clip, clip_steps, options)
    export_clip(clip, options.out / "tiny-clip")

    flux = {"empty": tokenise([""]), "vae": vae, "batch_size": options.batch, **common}
    teacher, student = TextToVelocity(), TextToVelocity()
    stage("flux", teacher, partial(FluxTraining, n_steps=options.flux_steps, lr=1.5e-3, **flux), options)
    distil = partial(GuidanceDistillation, teacher, n_steps=options.distil_steps, lr=5e-4, **flux)
    stage("distil", student, distil, options)
    export_flux(vae, student, options.out / "tiny-flux")


def stage(name: str, model: nn.Module, training: Callable[[], Training], options: argparse.Namespace) -> None:
    """Fill `model` with the averaged weights of the named stage, trained now (or trained on) unless they are there."""
    done = options.work / f"{name}.safetensors"
    if not done.exists():
        started = time.time()
        module = training()
        fit(name, module, options)
        save_model(module.average.cpu(), str(done))
        print(f"{name}: {module.n_steps} steps in {time.time() - started:.0f} s", flush=True)
    load_model(model, str(done))


def fit(name: str, training: Training, options: argparse.Namespace) -> None:
    folder = options.work / name
    checkpoint = ModelCheckpoint(folder, save_last=True, every_n_train_steps=2000, enable_version_counter=False)
    trainer = L.Trainer(
        max_steps=training.n_steps,
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        callbacks=[checkpoint],
        logger=L.pytorch.loggers.CSVLogger(options.work, name=name, version=0),
        log_every_n_steps=100,
        enable_progress_bar=options.progress,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(training, ckpt_path=last if last.exists() else None, weights_only=True)


@torch.inference_mode()
def psnr(vae: AutoencoderKL, pool: Pool) -> float:
    """Peak signal-to-noise ratio over freshly drawn scenes, in dB, by the mean squared error over all pixels."""
    generator = torch.Generator(vae.device).manual_seed(SEED)
    errors = []
    for start in range(0, 1000, 100):
        images = render(pool.pick(torch.arange(start, start + 100)).scenes, generator).images
        recon = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample
        errors.append(((recon.clamp(-1, 1) + 1) / 2 - images).square().mean())
    return -10 * torch.stack(errors).mean().log10().item()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-training"), help="where stages save as they go")
    parser.add_argument("--out", type=Path, default=Path("checkpoints"), help="where the finished folders are written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scenes", type=int, default=600_000, help="scenes in the pool")
    parser.add_argument("--batch", type=int, default=768)
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--clip-steps", type=int, default=3000)
    parser.add_argument("--flux-steps", type=int, default=20_000)
    parser.add_argument("--distil-steps", type=int, default=5000)
    parser.add_argument("--no-graphs", action="store_true", help="run every step eagerly")
    parser.add_argument("--progress", action="store_true", help="show Lightning's progress bars")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
