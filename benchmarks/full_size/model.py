"""FLUX.1-dev with random weights: its configurations, and modules made on the device from them, offline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

BUNDLED = Path("checkpoints/tiny-flux")
"""Its tokenizers and its schedule stand in for FLUX.1-dev's."""


class Size(NamedTuple):
    """What tells one FLUX from another, as arguments of each part's configuration."""

    transformer: dict[str, Any]
    t5: dict[str, Any]
    clip: dict[str, Any]
    vae: dict[str, Any]


FULL = Size(
    transformer={},  # diffusers' defaults are FLUX.1's
    t5={"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128},
    clip={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
)
TINY = Size(
    transformer={
        "num_layers": 16,
        "num_single_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 1,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    },
    t5={"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 32128},
    clip={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    vae={"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2},
)
"""Width 16, and as many blocks as the site in FLUX.1-dev's configuration asks for."""


def write_frame(folder: Path, size: Size) -> Path:
    """A pipeline folder without weights: what is read of one before weights are loaded."""
    shutil.copytree(BUNDLED, folder, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    with torch.device("meta"):
        for name, part in _parts(size).items():
            (folder / name / "config.json").write_text(json.dumps(_config(part)))
    return folder


def random_pipeline(size: Size, dtype: torch.dtype, device: torch.device) -> FluxPipeline:
    """A pipeline of random weights that are made on `device` in `dtype`."""
    torch.manual_seed(0)
    with _default_dtype(dtype), torch.device(device):
        parts = _parts(size)
    for part in parts.values():
        part.requires_grad_(False).eval()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(BUNDLED, subfolder="scheduler"),
        tokenizer=CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer"),
        tokenizer_2=T5Tokenizer.from_pretrained(BUNDLED / "tokenizer_2"),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _parts(size: Size) -> dict[str, nn.Module]:
    clip = CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer")
    words = {"bos_token_id": clip.bos_token_id, "eos_token_id": clip.eos_token_id, "pad_token_id": clip.pad_token_id}
    return {
        "transformer": FluxTransformer2DModel(**{"guidance_embeds": True, **size.transformer}),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**{"vocab_size": 49408, **words, **size.clip})),
        "text_encoder_2": T5EncoderModel(T5Config(**{"feed_forward_proj": "gated-gelu", **size.t5})),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=16,
            sample_size=1024,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **size.vae,
        ),
    }


def _config(part: Any) -> dict[str, Any]:
    values = dict(part.config) if isinstance(part.config, dict) else part.config.to_dict()  # diffusers', transformers'
    return {key: value for key, value in values.items() if not key.startswith("_")}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
