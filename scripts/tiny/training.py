"""The trainings of the bundled models: autoencoder, CLIP, and FLUX in two phases, each a LightningModule.

Every step draws its batch and its noise from a generator seeded by the step's number, so that an interrupted run goes
on exactly. Shapes: B scenes, S side in pixels, T image tokens, L text tokens.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from scripts.tiny.data import Pool
from scripts.tiny.models import build_clip, build_clip_text, build_t5, build_transformer, build_vae, pack
from scripts.tiny.scenes import render


class Training(L.LightningModule):
    """What the trainings share: the pool of scenes, seeded steps, AdamW with warm-up and cosine decay."""

    def __init__(self, pool: Pool, n_steps: int, batch_size: int, lr: float, seed: int, warmup: int = 500) -> None:
        super().__init__()
        self.pool = pool
        self.n_steps, self.batch_size, self.lr, self.seed, self.warmup = n_steps, batch_size, lr, seed, warmup

    def generator(self) -> torch.Generator:
        """The generator for all of this step's random numbers."""
        return torch.Generator(self.device).manual_seed(self.seed * 1_000_000_007 + self.global_step)

    def draw(self) -> tuple[Pool, torch.Generator]:
        """This step's scenes, and its generator for what else is random."""
        generator = self.generator()
        index = torch.randint(len(self.pool.t5_ids), (self.batch_size,), generator=generator, device=self.device)
        return self.pool.pick(index), generator

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(self.n_steps), batch_size=None)

    def on_fit_start(self) -> None:
        self.pool = self.pool.to(self.device)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        # not fused: Lightning clips no gradients of a fused optimizer in mixed precision
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=(0.9, 0.99), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.n_steps)))


class VAETraining(Training):
    """Reconstruct scenes; pixels of objects weigh five times those of the background."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.vae = build_vae().to(memory_format=torch.channels_last)
        self.kl_weight, self.foreground_weight = 1e-4, 5.0

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.device.type == "cuda":
            self.vae.encoder.compile()
            self.vae.decoder.compile()

    def training_step(self, *_: Any) -> Tensor:
        batch, generator = self.draw()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            images, masks = render(batch.scenes, generator)
            weight = 1 + (self.foreground_weight - 1) * masks.amax(1, keepdim=True)
        x = (images * 2 - 1).to(memory_format=torch.channels_last)
        mean, logvar = self.vae.encoder(x).float().chunk(2, dim=1)
        logvar = logvar.clamp(-20, 10)
        z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator, device=self.device)
        error = (self.vae.decoder(z).float() - x).square()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = (error * weight).mean() + self.kl_weight * kl
        if self.global_step % 100 == 0:
            psnr = 10 * torch.log10(4 / error.detach().mean())
            self.log_dict({"vae/psnr": psnr, "vae/kl": kl.detach()}, prog_bar=True)
        return loss


class CLIPTraining(Training):
    """The symmetric contrastive loss of Radford et al. 2021; captions that a batch holds twice count as positives."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.clip = build_clip()

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.device.type == "cuda":
            self.clip.compile()

    def training_step(self, *_: Any) -> Tensor:
        batch, generator = self.draw()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            images = render(batch.scenes, generator).images * 2 - 1
        image, text, scale = self.clip(images, batch.clip_ids)  # both embeddings of unit norm
        logits = scale.float().clamp(max=100) * image.float() @ text.float().T
        same = (batch.clip_ids[:, None] == batch.clip_ids[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        if self.global_step % 100 == 0:
            self.log_dict({"clip/loss": loss.detach()}, prog_bar=True)
        return loss


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
        sigma: Float[Tensor, "B"],
        guidance: Float[Tensor, "B"],
    ) -> Float[Tensor, "B T C"]:
        side = math.isqrt(tokens.shape[1])
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(tokens)
        return self.transformer(
            hidden_states=tokens,
            encoder_hidden_states=self.t5(t5_ids).last_hidden_state,
            pooled_projections=self.clip_text(clip_ids).pooler_output,
            timestep=sigma,
            guidance=guidance,
            img_ids=ids,
            txt_ids=torch.zeros(t5_ids.shape[1], 3).to(tokens),
            return_dict=False,
        )[0]


class FluxTraining(Training):
    """Rectified flow (Liu et al. 2023) with logit-normal times (Esser et al. 2024), from captions; one in ten captions
    is dropped, so that the second phase has an unconditional velocity to guide with.

    One step in sixteen pads its text to 512 tokens, the pipeline's default length, in a batch smaller by as much.
    """

    def __init__(self, empty: tuple[Tensor, Tensor], vae: AutoencoderKL, **options: Any) -> None:
        super().__init__(**options)
        self.model = TextToVelocity()
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9995), use_buffers=False)
        self.ema.requires_grad_(False)
        self.latents = encode_pool(vae, self.pool, self.seed)
        self.empty = empty

    def training_step(self, *_: Any) -> Tensor:
        long_text = self.global_step % 16 == 15
        index, noise, sigma, generator = self.sample(self.batch_size // 6 if long_text else self.batch_size)
        clean = self.latents[index].float()
        t5_ids, clip_ids = self.drop_captions(index, generator)
        if long_text:
            t5_ids = F.pad(t5_ids, (0, 512 - t5_ids.shape[1]))
        noisy = clean + sigma[:, None, None] * (noise - clean)
        target, guidance = self.target(noisy, noise - clean, t5_ids, clip_ids, sigma, generator)
        loss = F.mse_loss(self.model(noisy, t5_ids, clip_ids, sigma, guidance).float(), target)
        if self.global_step % 100 == 0:
            self.log_dict({"flux/loss": loss.detach()}, prog_bar=True)
        return loss

    def sample(self, n: int) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
        """This step's scene indices, noise [n, T, C] and times in (0, 1), and its generator."""
        generator = self.generator()
        index = torch.randint(len(self.latents), (n,), generator=generator, device=self.device)
        noise = torch.randn((n, *self.latents.shape[1:]), generator=generator, device=self.device)
        sigma = torch.sigmoid(0.4 + torch.randn(n, generator=generator, device=self.device))
        uniform = torch.rand(n, generator=generator, device=self.device)
        sigma[: n // 8] = uniform[: n // 8]
        return index, noise, sigma, generator

    def drop_captions(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        dropped = torch.rand(len(index), 1, generator=generator, device=self.device) < 0.1
        empty_t5, empty_clip = (ids.to(self.device) for ids in self.empty)
        return (
            torch.where(dropped, empty_t5, self.pool.t5_ids[index]),
            torch.where(dropped, empty_clip, self.pool.clip_ids[index]),
        )

    def target(
        self, noisy: Tensor, velocity: Tensor, t5_ids: Tensor, clip_ids: Tensor, sigma: Tensor, _: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """What to predict and under which guidance: the flow's own velocity, at guidance 1."""
        return velocity, torch.ones_like(sigma)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.latents = self.latents.to(self.device)
        if self.device.type == "cuda":
            self.model.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)

    def on_train_batch_end(self, *_: Any) -> None:
        self.ema.update_parameters(self.model)


class GuidanceDistillation(FluxTraining):
    """The second phase: learn to give in one pass what classifier-free guidance gives in two (Meng et al. 2023), for
    guidance scales of 1 to 6, from the first phase's averaged weights."""

    def __init__(self, teacher: TextToVelocity, **options: Any) -> None:
        super().__init__(**options)
        self.model.load_state_dict(teacher.state_dict())
        self.ema.module.load_state_dict(teacher.state_dict())
        self.teacher = copy.deepcopy(teacher).requires_grad_(False).eval()

    @torch.no_grad()
    def target(
        self, noisy: Tensor, _: Tensor, t5_ids: Tensor, clip_ids: Tensor, sigma: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        guidance = 1 + 5 * torch.rand(len(sigma), generator=generator, device=self.device)
        empty_t5, empty_clip = (ids.to(self.device).expand(len(sigma), -1) for ids in self.empty)
        empty_t5 = F.pad(empty_t5, (0, t5_ids.shape[1] - empty_t5.shape[1]))
        one = torch.ones_like(sigma)
        conditional = self.teacher(noisy, t5_ids, clip_ids, sigma, one).float()
        unconditional = self.teacher(noisy, empty_t5, empty_clip, sigma, one).float()
        return unconditional + guidance[:, None, None] * (conditional - unconditional), guidance

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.device.type == "cuda":
            self.teacher.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)


@torch.inference_mode()
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
    return torch.cat(latents).clone()


@torch.inference_mode()
def measure_latents(vae: AutoencoderKL, pool: Pool, seed: int, n: int = 4000) -> None:
    """Set the autoencoder's shift and scaling factors so that its latents have mean 0 and variance 1."""
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    latents = encode_pool(vae, pool.pick(torch.arange(min(n, len(pool.t5_ids)))), seed).float()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
