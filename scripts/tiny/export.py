"""Write trained parts as the folders that users load: a diffusers pipeline and an open_clip model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from open_clip.model import CLIP
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from scripts.tiny.models import build_scheduler, clip_config
from scripts.tiny.text import clip_tokenizer, t5_tokenizer
from scripts.tiny.training import TextToVelocity


def export_flux(vae: AutoencoderKL, model: TextToVelocity, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """A folder that `FluxPipeline.from_pretrained` loads; `tokenizer` is CLIP's."""
    pipeline = FluxPipeline(
        scheduler=build_scheduler(),
        vae=copy.deepcopy(vae),
        text_encoder=model.clip_text,
        tokenizer=tokenizer,
        text_encoder_2=model.t5,
        tokenizer_2=t5_tokenizer(),
        transformer=model.transformer,
    )
    pipeline.to("cpu")
    for part in (
        pipeline.transformer,
        pipeline.vae,
    ):  # these load as fp32 unless told otherwise, text encoders as saved
        part.to(torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)


def export_clip(clip: CLIP, folder: Path) -> None:
    """A folder that open_clip loads as `local-dir:FOLDER`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().half().contiguous() for name, value in clip.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(clip_config(), indent=2) + "\n")
    clip_tokenizer().save_pretrained(folder)
