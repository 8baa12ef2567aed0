"""The trainings of the bundled models: autoencoder, CLIP, and FLUX in two phases, each a LightningModule.

Every step draws its batch and its noise from a generator seeded by the step's number, so that an interrupted run goes
on exactly. Legend: B scenes, S side in pixels, T image tokens, C channels of a token, L text tokens.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float, Int
from torch import Tensor, nn

from scripts.tiny.data import Pool
from scripts.tiny.graphed import DeferredAdamW, GraphedStep
from scripts.tiny.models import build_clip, build_clip_text, build_t5, build_transformer, build_vae, pack
from scripts.tiny.scenes import render
from scripts.tiny.vocabulary import PLACES

AVERAGED_STEPS = 2000
"""The averaged weights forget what is older than about so many steps."""


class Training(L.LightningModule, ABC):
    """What the trainings share: the pool of scenes, seeded steps in one graph, AdamW with warm-up and cosine decay, and
    an average of the weights (`average`) that later stages use."""

    def __init__(
        self, model: nn.Module, pool: Pool, n_steps: int, batch_size: int, lr: float, seed: int, graphs: bool = True
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.pool = pool
        self.n_steps, self.batch_size, self.lr, self.seed, self.graphs = n_steps, batch_size, lr, seed, graphs
        self.share = self.last = torch.zeros(())
        self.graphed: GraphedStep

    @abstractmethod
    def inputs(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """This step's batch."""

    @abstractmethod
    def loss(self, *inputs: Tensor) -> Tensor:
        """What to minimise: captured into the graph, so it may not look at a value."""

    def training_step(self, *_: Any) -> None:
        optimizer = self.optimizers()
        self.adam.set_rate(self.rate(self.global_step), self.device)
        self.share.fill_(max(1 / AVERAGED_STEPS, 1 / (1 + self.global_step)))
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_000_007 + self.global_step)
        with torch.no_grad():
            inputs = self.inputs(generator)
        assert not isinstance(optimizer, list)
        if (self.global_step + 1) % 100 == 0:
            self.log("loss", self.last, prog_bar=True)
        self.last = optimizer.step(lambda: self.graphed(*inputs))

    def full_step(self, *inputs: Tensor) -> Tensor:
        self.adam.zero_grad(set_to_none=True)
        bf16 = self.device.type == "cuda"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
            loss = self.loss(*inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adam.update()
        with torch.no_grad():
            average: list[Tensor] = list(self.average.parameters())
            weights: list[Tensor] = list(self.model.parameters())
            torch._foreach_mul_(average, 1 - self.share)
            torch._foreach_add_(average, torch._foreach_mul(weights, self.share))
        return loss.detach()

    def on_fit_start(self) -> None:
        self.pool = self.pool.to(self.device)
        self.share = torch.ones((), device=self.device)
        self.last = torch.zeros((), device=self.device)
        self.graphed = GraphedStep(self.full_step, enabled=self.graphs and self.device.type == "cuda")

    def train_dataloader(self) -> range:
        return range(self.n_steps)

    def configure_optimizers(self) -> DeferredAdamW:
        parameters = list(self.model.parameters())
        self.adam = DeferredAdamW(parameters, self.device, betas=(0.9, 0.99), weight_decay=0.01)
        return self.adam

    def rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / min(500, self.n_steps / 5))
        return self.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.n_steps)))

    def scenes(self, generator: torch.Generator, n: int) -> Pool:
        index = torch.randint(len(self.pool.t5_ids), (n,), generator=generator, device=self.device)
        return self.pool.pick(index)


class VAETraining(Training):
    """Reconstruct scenes; pixels of objects weigh five times those of the background.

    Three quarters of the steps see 64×64 crops about an object, the last quarter whole images, a quarter as many.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(build_vae().to(memory_format=torch.channels_last), **options)
        self.kl_weight, self.foreground_weight, self.crop = 1e-4, 5.0, 64

    def inputs(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        whole = self.global_step >= 0.75 * self.n_steps
        batch = self.scenes(generator, self.batch_size // 4 if whole else self.batch_size)
        images, masks = render(batch.scenes, generator)
        weight = 1 + (self.foreground_weight - 1) * masks.amax(1, keepdim=True)
        x = torch.cat([images * 2 - 1, weight], dim=1)
        if not whole:
            x = self.cropped(x, batch.scenes.places[:, 0], generator)
        side = x.shape[-1] // 8
        noise = torch.randn((len(x), 16, side, side), generator=generator, device=self.device)
        return x.to(memory_format=torch.channels_last), noise

    def cropped(self, x: Float[Tensor, "B C S S"], place: Int[Tensor, " B"], generator: torch.Generator) -> Tensor:
        centre = torch.tensor(list(PLACES.values()), device=self.device)[place] * x.shape[-1] - self.crop / 2
        jitter = torch.randint(-10, 11, (len(x), 2), generator=generator, device=self.device)
        corner = (centre + jitter).round().long().clamp(0, x.shape[-1] - self.crop)
        offsets = torch.arange(self.crop, device=self.device)
        rows, columns = corner[:, 1, None] + offsets, corner[:, 0, None] + offsets
        scenes = torch.arange(len(x), device=self.device)
        return x.permute(0, 2, 3, 1)[scenes[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def loss(self, *inputs: Tensor) -> Tensor:
        images, noise = inputs
        x, weight = images[:, :3], images[:, 3:]
        assert isinstance(self.model, AutoencoderKL)
        mean, logvar = self.model.encoder(x).float().chunk(2, dim=1)
        logvar = logvar.clamp(-20, 10)
        recon = self.model.decoder(mean + torch.exp(0.5 * logvar) * noise).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return ((recon - x).square() * weight).mean() + self.kl_weight * kl


class CLIPTraining(Training):
    """The symmetric contrastive loss of Radford et al. 2021; captions that a batch holds twice count as positives."""

    def __init__(self, **options: Any) -> None:
        super().__init__(build_clip(), **options)

    def inputs(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        batch = self.scenes(generator, self.batch_size)
        return render(batch.scenes, generator).images * 2 - 1, batch.clip_ids

    def loss(self, *inputs: Tensor) -> Tensor:
        images, ids = inputs
        image, text, scale = self.model(images, ids)  # both embeddings of unit norm
        logits = scale.float().clamp(max=100) * image.float() @ text.float().T
        same = (ids[:, None] == ids[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class TextToVelocity(nn.Module):
    """The transformer with both text encoders: noisy tokens and token ids to the predicted velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.t5, self.clip_text = build_transformer(), build_t5(), build_clip_text()
        self.t5.shared.weight.data.mul_(0.05)

    def forward(
        self,
        tokens: Float[Tensor, "B T C"],
        t5_ids: Int[Tensor, "B L"],
        clip_ids: Int[Tensor, "B M"],
        sigma: Float[Tensor, " B"],
        guidance: Float[Tensor, " B"],
    ) -> Float[Tensor, "B T C"]:
        side = torch.arange(math.isqrt(tokens.shape[1]), device=tokens.device)
        rows, columns = torch.meshgrid(side, side, indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(tokens)
        return self.transformer(
            hidden_states=tokens,
            encoder_hidden_states=self.t5(t5_ids).last_hidden_state,
            pooled_projections=self.clip_text(clip_ids).pooler_output,
            timestep=sigma,
            guidance=guidance,
            img_ids=ids,
            txt_ids=torch.zeros(t5_ids.shape[1], 3, device=tokens.device, dtype=tokens.dtype),
            return_dict=False,
        )[0]


class FluxTraining(Training):
    """Rectified flow (Liu et al. 2023) with logit-normal times (Esser et al. 2024), from captions; one in ten captions
    is dropped, so that the second phase has an unconditional velocity to guide with.

    One step in sixteen pads its text to 512 tokens, the pipeline's default length, in a batch smaller by as much.
    """

    def __init__(self, empty: tuple[Tensor, Tensor], vae: AutoencoderKL, **options: Any) -> None:
        super().__init__(TextToVelocity(), **options)
        self.latents = encode_pool(vae, self.pool, self.seed)
        self.empty = empty

    def inputs(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Noisy tokens, the flow's velocity, token ids of both encoders, and times in (0, 1)."""
        long_text = self.global_step % 16 == 15
        n = max(1, self.batch_size // 6) if long_text else self.batch_size
        index = torch.randint(len(self.latents), (n,), generator=generator, device=self.device)
        clean = self.latents[index].float()
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        sigma = torch.sigmoid(0.4 + torch.randn(n, generator=generator, device=self.device))
        uniform = torch.rand(n, generator=generator, device=self.device)
        sigma[: n // 8] = uniform[: n // 8]
        t5_ids, clip_ids = self.drop_captions(index, generator)
        if long_text:
            t5_ids = F.pad(t5_ids, (0, 512 - t5_ids.shape[1]))
        guidance = 1 + 5 * torch.rand(n, generator=generator, device=self.device)
        return clean + sigma[:, None, None] * (noise - clean), noise - clean, t5_ids, clip_ids, sigma, guidance

    def drop_captions(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        dropped = torch.rand(len(index), 1, generator=generator, device=self.device) < 0.1
        return (
            torch.where(dropped, self.empty[0], self.pool.t5_ids[index]),
            torch.where(dropped, self.empty[1], self.pool.clip_ids[index]),
        )

    def loss(self, *inputs: Tensor) -> Tensor:
        noisy, velocity, t5_ids, clip_ids, sigma, _ = inputs
        return F.mse_loss(self.model(noisy, t5_ids, clip_ids, sigma, torch.ones_like(sigma)).float(), velocity)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.latents = self.latents.to(self.device)
        self.empty = (self.empty[0].to(self.device), self.empty[1].to(self.device))
        compile_blocks(self.model)


class GuidanceDistillation(FluxTraining):
    """The second phase: learn to give in one pass what classifier-free guidance gives in two (Meng et al. 2023), for
    guidance scales of 1 to 6, from the first phase's averaged weights."""

    def __init__(self, teacher: TextToVelocity, **options: Any) -> None:
        super().__init__(**options)
        self.model.load_state_dict(teacher.state_dict())
        self.average.load_state_dict(teacher.state_dict())
        self.teacher = copy.deepcopy(teacher).requires_grad_(False).eval()

    def loss(self, *inputs: Tensor) -> Tensor:
        noisy, _, t5_ids, clip_ids, sigma, guidance = inputs
        target = self.guided(noisy, t5_ids, clip_ids, sigma, guidance)
        return F.mse_loss(self.model(noisy, t5_ids, clip_ids, sigma, guidance).float(), target)

    @torch.no_grad()
    def guided(self, noisy: Tensor, t5_ids: Tensor, clip_ids: Tensor, sigma: Tensor, guidance: Tensor) -> Tensor:
        """The teacher's velocity under classifier-free guidance (Ho & Salimans 2022)."""
        empty_t5 = F.pad(self.empty[0], (0, t5_ids.shape[1] - self.empty[0].shape[1])).expand_as(t5_ids)
        one = torch.ones_like(sigma)
        conditional = self.teacher(noisy, t5_ids, clip_ids, sigma, one).float()
        unconditional = self.teacher(noisy, empty_t5, self.empty[1].expand_as(clip_ids), sigma, one).float()
        return unconditional + guidance[:, None, None] * (conditional - unconditional)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        compile_blocks(self.teacher)


def compile_blocks(model: nn.Module) -> None:
    """Compile the transformer's blocks on a GPU. Static shapes: with dynamic ones Inductor fails on the long texts."""
    assert isinstance(model, TextToVelocity)
    if next(model.parameters()).is_cuda:
        model.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, pool: Pool, seed: int, batch_size: int = 1000) -> Float[Tensor, "N T C"]:
    """Every scene of the pool, rendered and encoded, as scaled and packed latents (bf16 on a GPU, fp32 elsewhere)."""
    device = vae.device
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    latents = []
    for start in range(0, len(pool.t5_ids), batch_size):
        index = torch.arange(start, min(start + batch_size, len(pool.t5_ids)))
        images = render(pool.pick(index).scenes, generator).images
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            mean = vae.encode(images * 2 - 1).latent_dist.mean
        scaled = (mean.float() - vae.config.shift_factor) * vae.config.scaling_factor
        latents.append(pack(scaled).to(dtype))
    return torch.cat(latents)


def measure_latents(vae: AutoencoderKL, pool: Pool, seed: int, n: int = 4000) -> None:
    """Set the autoencoder's shift and scaling factors so that its latents have mean 0 and variance 1."""
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    latents = encode_pool(vae, pool.pick(torch.arange(min(n, len(pool.t5_ids)))), seed).float()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
