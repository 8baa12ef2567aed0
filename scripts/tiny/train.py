"""Train the bundled models, from nothing, in order: `python -m scripts.tiny.train --work runs/tiny-training`.

Each stage saves as it goes and, started again, goes on where it stopped; a finished stage is not run again. Finished
parts can be given instead of trained (`--vae`, `--clip`). It takes one GPU, or a CPU that multiplies in bf16, and
prints the seconds of each stage, which the model cards quote. On a CPU glibc must keep what is freed, or steps take far
longer: MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456.
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
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from fluxsae.files.whole import whole_file
from fluxsae.scoring.clip import load_clip
from scripts.tiny.data import Pool, build_pool, tokenise
from scripts.tiny.export import export_clip, export_flux
from scripts.tiny.models import build_clip, build_vae, clip_text_of
from scripts.tiny.scenes import render
from scripts.tiny.text import clip_tokenizer
from scripts.tiny.training import (
    CLIPTraining,
    Encoded,
    FluxTraining,
    GuidanceDistillation,
    TextToVelocity,
    Training,
    VAETraining,
    encode_pool,
    measure_latents,
)

SEED = 20
FLUX_JITTER = 1 / 3
"""The transformer's scenes vary less in place and size than the autoencoder's and CLIP's: they are learned faster."""


def main() -> None:
    options = parse()
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward gives NaN at head width 32 in bf16
    L.seed_everything(SEED, verbose=False)
    pool = build_pool(options.scenes, SEED, n_processes=min(16, os.cpu_count() or 1), clip=options.clip)
    common = {"pool": pool, "seed": SEED}

    if options.vae:
        vae = AutoencoderKL.from_pretrained(options.vae)
    else:
        vae = build_vae()
        stage("vae", vae, partial(VAETraining, n_steps=options.vae_steps, batch_size=256, lr=2e-3, **common), options)
        measure_latents(vae.eval().to(options.device), pool, SEED)
    vae.eval().to(options.device)
    print(f"vae: held-out scenes at {psnr(vae, build_pool(1000, SEED + 1)):.2f} dB", flush=True)

    if options.clip:
        clip = load_clip(f"local-dir:{options.clip}").model
    else:
        clip = build_clip()
        stage(
            "clip", clip, partial(CLIPTraining, n_steps=options.clip_steps, batch_size=768, lr=1e-3, **common), options
        )
        export_clip(clip, options.out / "tiny-clip")

    tokenizer = clip_tokenizer(options.clip)
    model = TextToVelocity(clip_text_of(clip, tokenizer))
    encoded = encode_once(vae, pool, options.work / "encoded.safetensors")
    flux = {"encoded": encoded, "empty": tokenise([""], options.clip), "batch_size": options.batch, **common}
    stage("flux", model, partial(FluxTraining, model, n_steps=options.flux_steps, lr=options.lr, **flux), options)
    distil = partial(GuidanceDistillation, model, n_steps=options.distil_steps, lr=options.lr / 3, **flux)
    stage("distil", model, distil, options)
    export_flux(vae, model, tokenizer, options.out / "tiny-flux")


def encode_once(vae: AutoencoderKL, pool: Pool, path: Path) -> Encoded:
    if not path.exists():
        started = time.time()
        with whole_file(path) as temporary:
            save_file(encode_pool(vae, pool, SEED, jitter=FLUX_JITTER)._asdict(), temporary)
        print(f"encoded {len(pool.t5_ids)} scenes in {time.time() - started:.0f} s", flush=True)
    return Encoded(**load_file(path))


def stage(name: str, model: nn.Module, training: Callable[[], Training], options: argparse.Namespace) -> None:
    """Fill `model` with the averaged weights of the named stage, trained now (or trained on) unless they are there."""
    done = options.work / f"{name}.safetensors"
    if not done.exists():
        started = time.time()
        module = training()
        fit(name, module, options)
        save_model(module.average.cpu(), str(done))
        print(f"{name}: {module.n_steps} steps in {time.time() - started:.0f} s", flush=True)
    load_model(model.cpu(), str(done))


def fit(name: str, training: Training, options: argparse.Namespace) -> None:
    folder = options.work / name
    checkpoint = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1000, enable_version_counter=False)
    trainer = L.Trainer(
        max_steps=training.n_steps,
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
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
    parser.add_argument("--scenes", type=int, default=65_000, help="scenes in the pool")
    parser.add_argument("--vae", type=Path, help="a folder with a trained autoencoder, not trained again")
    parser.add_argument("--clip", type=Path, help="a folder with a trained CLIP in open_clip's form, not trained again")
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--clip-steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64, help="scenes in a step of the transformer")
    parser.add_argument("--lr", type=float, default=1e-3, help="the transformer's learning rate at its highest")
    parser.add_argument("--flux-steps", type=int, default=6000)
    parser.add_argument("--distil-steps", type=int, default=700)
    parser.add_argument("--progress", action="store_true", help="show Lightning's progress bars")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
