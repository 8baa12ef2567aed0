"""The bundled models before training: a FLUX.1-dev in small, part by part, and a CLIP in open_clip's form."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from einops import rearrange
from open_clip.model import CLIP
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from scripts.tiny.scenes import SIDE
from scripts.tiny.text import TEXT_LENGTH, clip_tokenizer, t5_tokenizer

WIDTH = 192
POOLED = 128


def build_vae() -> AutoencoderKL:
    """An f8 autoencoder with 16 latent channels; scaling and shift are set when it is trained."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=16,
        sample_size=SIDE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_transformer() -> FluxTransformer2DModel:
    """2 dual-stream and 4 single-stream blocks of width 192; modulations and the output start at zero, so that every
    block starts as the identity (adaLN-Zero, Peebles & Xie 2023)."""
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if name == "proj_out" or name.endswith((".norm.linear", "norm1.linear", "norm1_context.linear")):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.zeros_(model.norm_out.linear.weight)
    return model


def build_t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=WIDTH,
            d_kv=32,
            d_ff=512,
            num_layers=2,
            num_heads=6,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def clip_text_of(clip: CLIP, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text tower of an open_clip model as transformers' module. Its pooled output is the embedding before the
    projection into the space that text and image share, as FLUX takes it."""
    width, layers = POOLED, len(clip.transformer.resblocks)
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=width,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    theirs = clip.state_dict()
    weights = {
        "embeddings.token_embedding.weight": theirs["token_embedding.weight"],
        "embeddings.position_embedding.weight": theirs["positional_embedding"],
        "final_layer_norm.weight": theirs["ln_final.weight"],
        "final_layer_norm.bias": theirs["ln_final.bias"],
    }
    names = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for layer, kind in product(range(layers), ("weight", "bias")):
        ours, block = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        weights |= {
            f"{ours}{name}.{kind}": theirs[f"{block}{theirs_name}.{kind}"] for name, theirs_name in names.items()
        }
        packed = theirs[f"{block}attn.in_proj_{kind}"].chunk(3)
        weights |= {f"{ours}self_attn.{q}_proj.{kind}": part for q, part in zip("qkv", packed, strict=True)}
    model.load_state_dict(weights)
    return model


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's own schedule."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def clip_config() -> dict[str, Any]:
    """open_clip's own `open_clip_config.json`."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": SIDE, "layers": 6, "width": 192, "head_width": 32, "patch_size": 8},
            "text_cfg": {
                "context_length": TEXT_LENGTH,
                "vocab_size": len(clip_tokenizer()),
                "hf_tokenizer_name": "tiny-clip",  # any name: open_clip reads the tokenizer beside this file
                "width": 128,
                "heads": 4,
                "layers": 3,
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"},
    }


def build_clip() -> CLIP:
    config = clip_config()["model_cfg"]
    text = {key: value for key, value in config["text_cfg"].items() if key != "hf_tokenizer_name"}
    return CLIP(config["embed_dim"], config["vision_cfg"], text)


def n_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, H, W] as FLUX's 2×2 patches [B, H/2·W/2, 4C], the channel slowest inside a patch."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
