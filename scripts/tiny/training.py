"""The trainings of the bundled models: autoencoder, CLIP, and FLUX in two phases, each a LightningModule.

Every step draws its batch and its noise from a generator seeded by the step's number, so that an interrupted run goes
on exactly. Legend: B scenes, S side in pixels, T image tokens, C channels of a token, L text tokens, K labels.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float, Int
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel

from scripts.tiny.data import Pool
from scripts.tiny.models import WIDTH, build_clip, build_t5, build_transformer, build_vae, pack
from scripts.tiny.muon import MuonAdamW
from scripts.tiny.scenes import BACKGROUND_NAMES, OBJECT_NAMES, render
from scripts.tiny.vocabulary import PLACES

N_LABELS = len(OBJECT_NAMES) + len(BACKGROUND_NAMES)
AVERAGE_POWER = 9
"""Weights of step t count as t to this power in the average, which so forgets all but the last tenth of a training
(Karras et al. 2024, equation 2)."""


class Training(L.LightningModule, ABC):
    """What the trainings share: the pool of scenes, steps with seeds of their own, AdamW with warm-up and cosine decay,
    and an average of the weights (`average`) that later stages use."""

    def __init__(self, model: nn.Module, pool: Pool, n_steps: int, batch_size: int, lr: float, seed: int) -> None:
        super().__init__()
        self.model = model
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.pool = pool
        self.n_steps, self.batch_size, self.lr, self.seed = n_steps, batch_size, lr, seed

    @abstractmethod
    def inputs(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """This step's batch."""

    @abstractmethod
    def loss(self, *inputs: Tensor) -> Tensor:
        """What to minimise."""

    def training_step(self, *_: Any) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_000_007 + self.global_step)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # bf16 is too coarse to place objects
            inputs = self.inputs(generator)
        loss = self.loss(*inputs)
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        share = min(1.0, (AVERAGE_POWER + 1) / (AVERAGE_POWER + self.global_step))
        average: list[Tensor] = list(self.average.parameters())
        weights: list[Tensor] = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(average, weights, share)

    def on_fit_start(self) -> None:
        self.pool = self.pool.to(self.device)

    def train_dataloader(self) -> range:
        return range(self.n_steps)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer(self) -> torch.optim.Optimizer:
        parameters = self.model.parameters()
        return torch.optim.AdamW(parameters, lr=self.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    def rate(self, step: int) -> float:
        """The learning rate at a step, as a share of `lr`."""
        warm = min(1.0, (step + 1) / min(200, self.n_steps / 5))
        return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.n_steps)))

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
    """The transformer with both text encoders: noisy tokens and token ids to the predicted velocity.

    CLIP's text encoder is a trained one and stays as it is. `label_head` tells from the last dual-stream block's image
    tokens what they show; training alone uses it.
    """

    def __init__(self, clip_text: CLIPTextModel) -> None:
        super().__init__()
        self.transformer, self.t5 = build_transformer(), build_t5()
        self.clip_text = clip_text.requires_grad_(False)
        self.label_head = nn.Linear(WIDTH, N_LABELS)
        self.t5.shared.weight.data.mul_(0.05)
        self._hidden: list[Tensor] = []
        self.transformer.transformer_blocks[-1].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        self._hidden[:] = [outputs[1]]

    def forward(
        self,
        tokens: Float[Tensor, "B T C"],
        t5_ids: Int[Tensor, "B L"],
        clip_ids: Int[Tensor, "B M"],
        sigma: Float[Tensor, " B"],
        guidance: Float[Tensor, " B"],
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B T K"]]:
        """The velocity, and the logits of each token's label."""
        side = torch.arange(math.isqrt(tokens.shape[1]), device=tokens.device)
        rows, columns = torch.meshgrid(side, side, indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(tokens)
        velocity = self.transformer(
            hidden_states=tokens,
            encoder_hidden_states=self.t5(t5_ids).last_hidden_state,
            pooled_projections=self.clip_text(clip_ids).pooler_output,
            timestep=sigma,
            guidance=guidance,
            img_ids=ids,
            txt_ids=torch.zeros(t5_ids.shape[1], 3, device=tokens.device, dtype=tokens.dtype),
            return_dict=False,
        )[0]
        return velocity, self.label_head(self._hidden.pop())


class FluxTraining(Training):
    """Rectified flow (Liu et al. 2023) with logit-normal times (Esser et al. 2024), from captions; one in ten captions
    is dropped, so that the second phase has an unconditional velocity to guide with.

    Two aids make objects form early, and fade out over the first `aided` of the steps: errors on objects weigh
    `emphasis` times those on the background, and a linear head must tell from each image token of the last dual-stream
    block which object or background it shows, which text has to answer where noise hides the image (after the
    alignment of representations by Yu et al. 2025).

    One step in 32 pads its text to 512 tokens, the pipeline's default length, in a batch smaller by as much.
    """

    aided, emphasis, label_weight = 0.7, 4.0, 0.1

    def __init__(self, model: TextToVelocity, encoded: Encoded, empty: tuple[Tensor, Tensor], **options: Any) -> None:
        super().__init__(model, **options)
        self.encoded, self.empty = encoded, empty

    def inputs(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Noisy tokens, the flow's velocity, token ids of both encoders, times in (0, 1), guidance scales, and what the
        tokens show: objects' share and label."""
        long_text = self.global_step % 32 == 31
        n = max(1, self.batch_size // 6) if long_text else self.batch_size
        index = torch.randint(len(self.encoded.tokens), (n,), generator=generator, device=self.device)
        clean = self.encoded.tokens[index].float()
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        sigma = torch.sigmoid(0.4 + torch.randn(n, generator=generator, device=self.device))
        uniform = torch.rand(n, generator=generator, device=self.device)
        sigma[: n // 8] = uniform[: n // 8]
        t5_ids, clip_ids = self.drop_captions(index, generator)
        if long_text:
            t5_ids = F.pad(t5_ids, (0, 512 - t5_ids.shape[1]))
        guidance = 1 + 5 * torch.rand(n, generator=generator, device=self.device)
        noisy, velocity = clean + sigma[:, None, None] * (noise - clean), noise - clean
        shown = self.encoded.coverage[index].float(), self.encoded.labels[index].long()
        return noisy, velocity, t5_ids, clip_ids, sigma, guidance, *shown

    def drop_captions(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        dropped = torch.rand(len(index), 1, generator=generator, device=self.device) < 0.1
        return (
            torch.where(dropped, self.empty[0], self.pool.t5_ids[index]),
            torch.where(dropped, self.empty[1], self.pool.clip_ids[index]),
        )

    def loss(self, *inputs: Tensor) -> Tensor:
        noisy, velocity, t5_ids, clip_ids, sigma, _, coverage, labels = inputs
        predicted, logits = self.model(noisy, t5_ids, clip_ids, sigma, torch.ones_like(sigma))
        aid = max(0.0, 1 - self.global_step / (self.aided * self.n_steps))
        weight = 1 + aid * (self.emphasis - 1) * coverage[:, :, None]
        error = (predicted.float() - velocity).square()
        label_loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        self.log_dict({"error": error.mean(), "label_loss": label_loss})
        return (error * weight).mean() + aid * self.label_weight * label_loss

    def optimizer(self) -> torch.optim.Optimizer:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        hidden = [name for name, p in trained.items() if p.ndim == 2 and "block" in name and "norm" not in name]
        hidden = [name for name in hidden if "relative_attention_bias" not in name]
        others = [p for name, p in trained.items() if name not in set(hidden)]
        return MuonAdamW([trained[name] for name in hidden], others, lr=self.lr, muon_lr=2 * self.lr)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.encoded = Encoded(*(x.to(self.device) for x in self.encoded))
        self.empty = (self.empty[0].to(self.device), self.empty[1].to(self.device))
        compile_blocks(self.model)


class GuidanceDistillation(FluxTraining):
    """The second phase: learn to give in one pass what classifier-free guidance gives in two (Meng et al. 2023), for
    guidance scales of 1 to 6, from the first phase's averaged weights."""

    def __init__(self, model: TextToVelocity, **options: Any) -> None:
        super().__init__(model, **options)
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()

    def loss(self, *inputs: Tensor) -> Tensor:
        noisy, _, t5_ids, clip_ids, sigma, guidance, _, _ = inputs
        target = self.guided(noisy, t5_ids, clip_ids, sigma, guidance)
        return F.mse_loss(self.model(noisy, t5_ids, clip_ids, sigma, guidance)[0].float(), target)

    @torch.no_grad()
    def guided(self, noisy: Tensor, t5_ids: Tensor, clip_ids: Tensor, sigma: Tensor, guidance: Tensor) -> Tensor:
        """The teacher's velocity under classifier-free guidance (Ho & Salimans 2022)."""
        empty_t5 = F.pad(self.empty[0], (0, t5_ids.shape[1] - self.empty[0].shape[1])).expand_as(t5_ids)
        one = torch.ones_like(sigma)
        conditional = self.teacher(noisy, t5_ids, clip_ids, sigma, one)[0].float()
        unconditional = self.teacher(noisy, empty_t5, self.empty[1].expand_as(clip_ids), sigma, one)[0].float()
        return unconditional + guidance[:, None, None] * (conditional - unconditional)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        compile_blocks(self.teacher)


def compile_blocks(model: nn.Module) -> None:
    """Compile the transformer's blocks, which halves a step's time on a GPU and on a CPU alike.

    Static shapes: with dynamic ones Inductor fails on the long texts. Attention is written out on a CPU, where the
    fused kernel's backward takes as long as all the rest.
    """
    assert isinstance(model, TextToVelocity)
    if not next(model.parameters()).is_cuda:
        model.transformer.set_attention_backend("_native_math")
    model.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)


class Encoded(NamedTuple):
    """Every scene of a pool as the transformer sees it: scaled and packed latents, the share of each token's 16×16
    pixels that objects cover, and its label: the object that covers most of it, if more than 30 %, or the background
    (after the objects)."""

    tokens: Float[Tensor, "N T C"]
    coverage: Float[Tensor, "N T"]
    labels: Int[Tensor, "N T"]


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, pool: Pool, seed: int, jitter: float = 1.0, batch_size: int = 16) -> Encoded:
    """Render and encode every scene of the pool. Tokens and coverage in bf16, labels in uint8."""
    device = vae.device
    generator = torch.Generator(device).manual_seed(seed)
    parts = []
    for start in range(0, len(pool.t5_ids), batch_size):
        scenes = pool.pick(torch.arange(start, min(start + batch_size, len(pool.t5_ids)))).scenes
        images, masks = render(scenes, generator, jitter=jitter)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            mean = vae.encode((images * 2 - 1).to(memory_format=torch.channels_last)).latent_dist.mean
        tokens = pack((mean.float() - vae.config.shift_factor) * vae.config.scaling_factor)
        share, slot = F.avg_pool2d(masks, 16).flatten(2).max(1)
        objects = scenes.objects.to(device).gather(1, slot)
        background = len(OBJECT_NAMES) + scenes.background.to(device)[:, None]
        labels = torch.where(share > 0.3, objects, background)
        parts.append((tokens.bfloat16(), share.bfloat16(), labels.to(torch.uint8)))
    return Encoded(*(torch.cat(column) for column in zip(*parts, strict=True)))


def measure_latents(vae: AutoencoderKL, pool: Pool, seed: int, n: int = 4000) -> None:
    """Set the autoencoder's shift and scaling factors so that its latents have mean 0 and variance 1."""
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    latents = encode_pool(vae, pool.pick(torch.arange(min(n, len(pool.t5_ids)))), seed).tokens.float()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
