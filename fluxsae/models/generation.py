"""Generates images with diffusers' own pipeline, so that an image depends on its prompt and seed and not on its batch.

Legend: B batch, T tokens an image, C latent channels of a token, L text tokens, E their width, P pooled width;
H and W are an image's pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from fluxsae.models.batch_invariant import BatchInvariantLinear
from fluxsae.models.compiled import is_compiled
from fluxsae.models.embeddings import PromptEmbeddings, encode_prompts
from fluxsae.records import check_step, token_grid


class Generated(NamedTuple):
    """Latents as the transformer sees them (2×2 patches), after the last step that ran, and pixels where wanted.

    Both are on the pipeline's device, where they may still be being computed.
    """

    latents: Float[Tensor, "B T C"]
    pixels: UInt8[Tensor, "B H W 3"] | None

    @property
    def images(self) -> list[Image.Image] | None:
        """The pictures, copied from the device."""
        return None if self.pixels is None else pictures(self.pixels.cpu())


def initial_noise(
    seeds: Sequence[int], height: int, width: int, channels: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "B T C"]:
    """Gaussian noise for images of height × width pixels, each drawn in float32 from a CPU generator of its own.

    `channels` are those of the autoencoder; an image token holds a 2×2 patch of them. The noise of a seed is the same
    in any batch, on any device and, up to rounding, in any dtype.
    """
    rows, columns = token_grid(height, width)
    shape = (1, channels, 2 * rows, 2 * columns)
    latents = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return FluxPipeline._pack_latents(latents, len(seeds), channels, 2 * rows, 2 * columns).to(dtype)


def generate(
    pipe: FluxPipeline,
    prompts: Sequence[str] | PromptEmbeddings,
    seeds: Sequence[int],
    *,
    height: int,
    width: int,
    n_steps: int,
    guidance: float,
    text_length: int,
    images: bool = True,
    last_step: int | None = None,
) -> Generated:
    """One image for each pair of a prompt and a seed.

    An image depends on its prompt and seed, not on the other images of the batch. On a CPU in float32 it is equal bit
    for bit, unless blocks are compiled. Elsewhere it is equal up to rounding.

    With `last_step` the sampler stops after that step. The latents are then unfinished, so `images` must be False.

    Raises ValueError for sizes that are no multiples of 16, a step beyond the schedule, or fewer seeds than prompts.
    """
    token_grid(height, width)
    if last_step is not None:
        check_step(last_step, n_steps)
        if images:
            raise ValueError(f"an image needs all {n_steps} steps, but last_step is {last_step}; set images to False.")
    if not isinstance(prompts, PromptEmbeddings):
        prompts = encode_prompts(pipe, list(prompts), text_length)
    if len(prompts.prompt) != len(seeds):
        raise ValueError(f"there are {len(prompts.prompt)} prompts but {len(seeds)} seeds; give each prompt its seed.")
    device, dtype = pipe._execution_device, pipe.transformer.dtype
    exact = device.type == "cpu" and dtype == torch.float32 and not is_compiled(pipe.transformer)
    noise = initial_noise(seeds, height, width, pipe.transformer.config.in_channels // 4, dtype)
    if device.type == "cuda":  # without waiting for what the device still has to do
        noise = noise.pin_memory().to(device, non_blocking=True)
    with BatchInvariantLinear(len(seeds)) if exact else nullcontext():
        latents: Tensor = pipe(
            latents=noise,
            prompt_embeds=prompts.prompt.to(device, dtype),
            pooled_prompt_embeds=prompts.pooled.to(device, dtype),
            height=height,
            width=width,
            num_inference_steps=n_steps,
            guidance_scale=guidance,
            max_sequence_length=text_length,
            output_type="latent",
            callback_on_step_end=None if last_step is None else _stop_after(last_step),
        ).images
    return Generated(latents, decode_latents(pipe, latents, height, width) if images else None)


@torch.no_grad()
def decode_latents(
    pipe: FluxPipeline, latents: Float[Tensor, "B T C"], height: int, width: int
) -> UInt8[Tensor, "B H W 3"]:
    """The pixels of finished latents, rounded as the pipeline rounds them. Nothing waits for the device.

    Images are decoded one at a time. So they do not depend on their batch, and need the memory of one.
    """
    config = pipe.vae.config
    unpacked = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    unpacked = unpacked / config.scaling_factor + config.shift_factor
    decoded = torch.cat([pipe.vae.decode(one, return_dict=False)[0] for one in unpacked.split(1)])
    shown = pipe.image_processor.postprocess(decoded, output_type="pt")
    return (shown.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def pictures(pixels: UInt8[Tensor, "B H W 3"]) -> list[Image.Image]:
    """Pixels in host memory as pictures."""
    return [Image.fromarray(one.numpy()) for one in pixels]


def time_shift(scheduler: Any, n_tokens: int) -> float:
    """The time shift that the pipeline sets on `scheduler` for images of `n_tokens` tokens (Esser et al. 2024)."""
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return float(config.shift)
    mu = calculate_shift(
        n_tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    return math.exp(mu) if config.time_shift_type == "exponential" else mu


def _stop_after(last_step: int) -> Callable[[FluxPipeline, int, Any, dict[str, Any]], dict[str, Any]]:
    def at_step_end(pipe: FluxPipeline, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step >= last_step:
            pipe._interrupt = True  # diffusers' own switch: the remaining steps are passed over
        return values

    return at_step_end
