"""Shard sets and SAEs made up for tests: tokens from a known sparse dictionary, plain pictures.

Legend: T tokens an image, D width, G true directions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fluxsae.records.spec import CaptureSpec, GenerationSpec
from fluxsae.sae.base import SAE
from fluxsae.shards.format import Kind, SampleRecord, Storage
from fluxsae.shards.read import ShardSet
from fluxsae.shards.write import ShardWriter


class Dictionary(NamedTuple):
    """Tokens: `mean` + a few non-negative multiples of unit `directions`; direction g is on with `probability[g]`."""

    directions: Float[Tensor, "G D"]
    probability: Float[Tensor, "G"]
    size: Float[Tensor, "G"]
    mean: Float[Tensor, "D"]
    noise: float


def dictionary(d_in: int = 16, n_true: int = 32, active: float = 3.0, noise: float = 0.01, seed: int = 0) -> Dictionary:
    """A dictionary whose directions are used with power-law frequency and strength, `active` a token on average."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(n_true, d_in, generator=generator), dim=1)
    rank = torch.arange(1, n_true + 1, dtype=torch.float32)
    probability = rank**-0.7
    probability = (probability * (active / probability.sum())).clamp(max=0.9)
    return Dictionary(directions, probability, 4 * rank**-0.35, torch.randn(d_in, generator=generator), noise)


def draw(source: Dictionary, n_tokens: int, generator: torch.Generator) -> Float[Tensor, "N D"]:
    n_true, d_in = source.directions.shape
    on = torch.rand(n_tokens, n_true, generator=generator) < source.probability
    codes = on * source.size * (0.5 + torch.rand(n_tokens, n_true, generator=generator))
    return codes @ source.directions + source.mean + source.noise * torch.randn(n_tokens, d_in, generator=generator)


def generation_spec(size: int = 64, repetitions: int = 2, **changes: object) -> GenerationSpec:
    values: dict[str, object] = {
        "model": "tiny",
        "model_hash": "0" * 64,
        "height": size,
        "width": size,
        "n_steps": 4,
        "guidance": 3.5,
        "shift": 1.15,
        "text_length": 8,
        "dtype": "float32",
        "prompts_hash": "1" * 64,
        "repetitions": repetitions,
        "base_seed": 0,
    }
    return GenerationSpec.from_dict({**values, **changes})


def capture_spec(size: int = 64, repetitions: int = 2, step: int = 2, **changes: object) -> CaptureSpec:
    return CaptureSpec(generation_spec(size, repetitions, **changes), "transformer_blocks.1.ff", step)


def records(n_prompts: int, repetitions: int = 2) -> list[SampleRecord]:
    return [
        SampleRecord(p * repetitions + r, p, r, 1000 + p * repetitions + r, f"a small thing number {p}")
        for p in range(n_prompts)
        for r in range(repetitions)
    ]


def randomised(sae: SAE, seed: int = 0) -> SAE:
    """The SAE with random biases, an encoder unlike its decoder, and a normalisation that does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_enc, sae.b_dec):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        sae.mean.normal_(generator=generator)
        sae.scale.fill_(2.5)
    return sae


def token_shards(
    folder: Path,
    n_prompts: int = 12,
    repetitions: int = 2,
    *,
    size: int = 64,
    d_in: int = 16,
    storage: Storage = "bf16",
    images_per_shard: int = 5,
    source: Dictionary | None = None,
    seed: int = 0,
    skipped: Collection[int] = (),
) -> ShardSet:
    """A finished set of tokens [T=(size/16)², d_in] for n_prompts × repetitions images; of `skipped` they were NaN."""
    generator = torch.Generator().manual_seed(seed)
    spec = capture_spec(size, repetitions)
    source = source or dictionary(d_in)
    payloads = [draw(source, spec.n_tokens, generator) for _ in range(n_prompts * repetitions)]
    for image in skipped:
        payloads[image][3, 1] = torch.nan
    return _write(folder, spec, "tokens", storage, images_per_shard, records(n_prompts, repetitions), payloads)


def image_shards(
    folder: Path, n_prompts: int = 12, repetitions: int = 2, *, size: int = 64, images_per_shard: int = 5
) -> ShardSet:
    """A finished set of plainly coloured pictures, the same colour for the same prompt."""
    colours = [(37 * p % 256, 101 * p % 256, 59 * p % 256) for p in range(n_prompts) for _ in range(repetitions)]
    pictures = [Image.new("RGB", (size, size), colour) for colour in colours]
    spec = generation_spec(size, repetitions)
    return _write(folder, spec, "images", "bf16", images_per_shard, records(n_prompts, repetitions), pictures)


def _write(
    folder: Path,
    spec: CaptureSpec | GenerationSpec,
    kind: Kind,
    storage: Storage,
    images_per_shard: int,
    samples: list[SampleRecord],
    payloads: Sequence[Tensor | Image.Image],
) -> ShardSet:
    writer = ShardWriter(folder, spec, kind, storage, images_per_shard, skip_not_finite=True)
    n_shards = -(-len(samples) // images_per_shard)
    for record, payload in zip(samples, payloads, strict=True):
        writer.add(record.image // images_per_shard, record, payload)
    for shard in range(n_shards):
        writer.close_shard(shard)
    writer.finalise(n_shards)
    return ShardSet.open(folder)
