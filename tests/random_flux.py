"""A FLUX with random weights, in FLUX.1-dev's own diffusers layout and small enough to build in a second, offline."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

TEXT_LENGTH = 16


def random_flux(
    folder: Path,
    n_dual: int = 2,
    n_single: int = 2,
    heads: int = 2,
    head_width: int = 16,
    text_length: int = TEXT_LENGTH,
    sample_size: int = 64,
    seed: int = 0,
) -> Path:
    """Write a FLUX of width `heads · head_width` (head width a multiple of 8) to `folder` and return it.

    `text_length` is the T5 tokenizer's `model_max_length`, `sample_size` the default height and width in pixels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = _build(n_dual, n_single, heads, head_width, text_length, sample_size)
    pipe.save_pretrained(folder)
    return folder


def _build(n_dual: int, n_single: int, heads: int, head_width: int, text_length: int, sample_size: int) -> FluxPipeline:
    clip, t5 = _clip_tokenizer(), _t5_tokenizer(text_length)
    quarter = head_width // 8 * 2
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
        ),
        vae=_vae(sample_size),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=32,
                bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id,
                pad_token_id=clip.pad_token_id,
            )
        ).eval(),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(t5), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
        ).eval(),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=n_dual,
            num_single_layers=n_single,
            attention_head_dim=head_width,
            num_attention_heads=heads,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(head_width - 2 * quarter, quarter, quarter),
        ).eval(),
    )


def _vae(sample_size: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        sample_size=sample_size,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    ).eval()


def _clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE without merges: every byte is a token, so any prompt can be read."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(f"{byte}</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=32)


def _t5_tokenizer(text_length: int) -> T5Tokenizer:
    """Unigram over single letters; what is not printable ASCII is <unk>."""
    letters = sorted(set(string.printable) - set(string.whitespace))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), *((letter, -10.0) for letter in letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=text_length)
