"""Steers features of an SAE over strengths, prompts and seeds, beside random directions of equal norm.

Legend: V variants, B images of a batch, S steered features.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor

from fluxsae.capture import GenerationRequest, RequestBatch
from fluxsae.models import (
    EmbeddingCache,
    FluxPipeline,
    PromptEmbeddings,
    find_module,
    generate,
    load_pipeline,
    record,
    transformer_skeleton,
    weights_identity,
)
from fluxsae.records import CaptureSpec, Feature, Grid, Selection, check_step, parse_site
from fluxsae.sae import SAE, load_sae
from fluxsae.shards import ShardSet
from fluxsae.steering.intervention import Schedule, intervene, random_twin

Mode = Literal["add", "scale", "clamp"]
Kind = Literal["baseline", "feature", "random"]


class Variant(NamedTuple):
    """One way to make the images of a batch. A random direction that stands for every feature has no `feature`."""

    kind: Kind
    feature: int | None
    strength: float
    draw: int = 0


class Steered(NamedTuple):
    """The images of a batch under every variant, the unsteered ones first.

    `activations` are the largest codes over tokens of `features`, at the SAE's own site and step, as the tokens
    arrive there: an edit at that very place is not in them, what it did to earlier steps and layers is.
    """

    requests: list[GenerationRequest]
    features: list[int]
    variants: list[Variant]
    images: list[list[Image.Image]]
    activations: Float[Tensor, "V B S"]


class FluxSteering(LightningModule):
    """Generates each image of a `PromptData` unsteered, steered with each feature, and steered with random directions.

    Run it with `test`. Model, size, schedule, guidance and site are those of the SAE's capture.

    Args:
        sae: folder of an SAE, or a `.pt` checkpoint with `model_state_dict` and `config`.
        select: the features: a selection from the features table, or a list of numbers.
        strengths: the strengths to try for each feature. For `add` they are in units of the mean token norm at the
            site. For `scale` they are factors of the code, and 0 removes the feature. For `clamp` they are new values
            of the code, in units of the feature's `max` if `select` names a features table.
        mode: add the feature's direction, or scale or clamp its code.
        first_step: the first step to edit, from 0.
        last_step: the last step to edit; by default the last of the schedule.
        schedule: the weight of the edit over these steps: constant, or falling from 1 as a line or a cosine.
        mask: a picture whose brightness says how much each token is edited; by default all tokens fully.
        n_random: number of random directions for each strength.
        model: a folder or hub id of the same weights, if they have moved since the capture.
        shards: the set of tokens that a `.pt` checkpoint was trained on. SAE folders know theirs.
        seed: decides the random directions.
    """

    def __init__(
        self,
        sae: Path,
        select: Selection | list[int],
        strengths: list[float],
        mode: Mode = "add",
        first_step: int = 0,
        last_step: int | None = None,
        schedule: Schedule = "constant",
        mask: Path | None = None,
        n_random: int = 1,
        model: str | None = None,
        shards: Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not strengths or n_random < 0:
            raise ValueError(
                f"there are {len(strengths)} strengths and n_random is {n_random}; give 1 strength or more."
            )
        self.sae = _load(sae, shards)
        assert self.sae.spec is not None
        self.spec: CaptureSpec = self.sae.spec
        n_steps = self.spec.generation.n_steps
        last = n_steps - 1 if last_step is None else last_step
        for step in (first_step, last):
            check_step(step, n_steps)
        if first_step > last:
            raise ValueError(f"first_step {first_step} is after last_step {last}; swap them.")
        self.select = select
        self.strengths = strengths
        self.mode = mode
        self.steps = range(first_step, last + 1)
        self.schedule: Schedule = schedule
        self.mask = None if mask is None else read_mask(mask, self.spec.generation.grid)
        self.n_random = n_random
        self.model = model or self.spec.generation.model
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Everything that can be refused before weights are loaded."""
        find_module(transformer_skeleton(self.model), parse_site(self.spec.site))
        found, wanted = weights_identity(self.model), self.spec.generation.model_hash
        if found != wanted:
            raise ValueError(
                f"{self.model} holds other weights ({found[:12]}…) than those that the SAE was trained on "
                f"({wanted[:12]}…); name the model of the capture, or fit an SAE on this one."
            )
        for feature in self.features:
            if not 0 <= feature < self.sae.n_features:
                raise ValueError(f"feature {feature} is not in this SAE, which has 0 to {self.sae.n_features - 1}.")

    # Lightning's annotation knows of tensors and mappings only; it hands callbacks whatever there is.
    def test_step(self, batch: RequestBatch, batch_idx: int = 0) -> Steered:  # type: ignore[override]
        pipe, cache = self._pipe_and_embeddings
        embeddings = cache.get([request.prompt for request in batch.requests])
        seeds = [request.seed for request in batch.requests]
        made = [self._make(pipe, variant, embeddings, seeds) for variant in self.variants]
        images, activations = zip(*made, strict=True)
        return Steered(batch.requests, self.features, self.variants, list(images), torch.stack(activations))

    @cached_property
    def rows(self) -> list[Feature]:
        """The selected rows of the features table; none when features were named by number."""
        return self.select.rows() if isinstance(self.select, Selection) else []

    @cached_property
    def features(self) -> list[int]:
        return [row.feature for row in self.rows] if isinstance(self.select, Selection) else self.select

    @cached_property
    def variants(self) -> list[Variant]:
        return [Variant("baseline", None, 0.0), *self._variants()]

    def _variants(self) -> Iterator[Variant]:
        # An added direction is as long for every feature, so one random direction is the control of all;
        # how far a changed code moves a token depends on the feature, so there each has its own.
        controls = [None] if self.mode == "add" else self.features
        for strength in self.strengths:
            yield from (Variant("feature", feature, strength) for feature in self.features)
            yield from (Variant("random", control, strength, i) for control in controls for i in range(self.n_random))

    @cached_property
    def _pipe_and_embeddings(self) -> tuple[FluxPipeline, EmbeddingCache]:
        generation = self.spec.generation
        pipe = load_pipeline(self.model, dtype=getattr(torch, generation.dtype), device=self.device)
        return pipe, EmbeddingCache(None, pipe, generation.model_hash, generation.text_length)

    def _make(
        self, pipe: FluxPipeline, variant: Variant, embeddings: PromptEmbeddings, seeds: list[int]
    ) -> tuple[list[Image.Image], Float[Tensor, "B S"]]:
        generation, site, step = self.spec.generation, self.spec.site, self.spec.step
        with (
            record(pipe, [site], [step]) as tape,  # before the edit, which it must not see
            intervene(pipe, mask=self.mask, site=site, steps=self.steps, schedule=self.schedule, **self._edit(variant)),
        ):
            images = generate(
                pipe,
                embeddings,
                seeds,
                height=generation.height,
                width=generation.width,
                n_steps=generation.n_steps,
                guidance=generation.guidance,
                text_length=generation.text_length,
            ).images
        assert images is not None
        return images, self.sae.encode(tape[site, step])[..., self.features].amax(dim=1).float().cpu()

    def _edit(self, variant: Variant) -> dict[str, Any]:
        """The arguments of `intervene` for a variant."""
        if variant.kind == "baseline":
            return {}
        if variant.feature is None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + variant.draw)
            direction = torch.randn(self.sae.d_in, generator=generator)
            return {"direction": direction, "strength": variant.strength, "mean_norm": self.sae.mean_norm}
        sae = self.sae
        if variant.kind == "random":
            sae = random_twin(sae, [variant.feature], self.seed * 1_000_003 + variant.draw)
        value = variant.strength
        if self.mode == "clamp" and self.rows:
            value *= self.rows[self.features.index(variant.feature)].max or 0.0
        return {"sae": sae, self.mode: {variant.feature: value}}


def read_mask(path: Path, grid: Grid) -> Float[Tensor, "R C"]:
    """A picture as a weight from 0 to 1 for each token: the mean brightness of its patch."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no mask {path}; name a picture, white where the image is to be steered.")
    with Image.open(path) as picture:
        small = picture.convert("L").resize((grid.columns, grid.rows), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255.0)


def _load(path: Path, shards: Path | None) -> SAE:
    sae = load_sae(path)
    if shards is not None and sae.spec is None:
        captured = ShardSet.open(shards, "tokens")
        sae.spec, sae.mean_norm = captured.spec, captured.statistics.mean_norm
    if sae.spec is None:
        raise ValueError(f"{path} does not say what it was trained on; name the set of tokens as `shards`.")
    return sae
