"""Generates images from prompts and captures what modules of the transformer hold meanwhile, as shard sets.

Legend: B batch, T tokens an image, D width.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from lightning import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from fluxsae.flux.embeddings import EmbeddingCache
from fluxsae.flux.generate import generate, time_shift
from fluxsae.flux.load import FluxPipeline, load_frame, load_pipeline, transformer_skeleton, weights_identity
from fluxsae.flux.record import record
from fluxsae.flux.streams import find_module
from fluxsae.one_run import OneRunOnly
from fluxsae.prompts import Prompt, prompts_hash
from fluxsae.requests import GenerationRequest, PromptData, RequestBatch, image_seed
from fluxsae.shards.format import SampleRecord, Storage
from fluxsae.shards.write import ShardWriter
from fluxsae.spec import CaptureSpec, GenerationSpec, Site, check_step, differences, parse_site, token_grid
from fluxsae.storage import read_json, remove_parts, write_json, write_text

__all__ = ["FluxCapture", "GenerationRequest", "PromptData", "RequestBatch", "image_seed", "set_folder"]

logger = logging.getLogger(__name__)

DType = Literal["float32", "bfloat16", "float16"]
GENERATION = "generation.json"
MAX_TEXT_LENGTH = 512
"""The most text tokens that diffusers' FLUX pipeline takes."""


class CaptureSet(NamedTuple):
    """One shard set that a capture fills: tokens of a site at a step, or the images when `site` is None."""

    writer: ShardWriter
    site: str | None = None
    step: int = 0


class AbandonParts(Callback):
    """Removes the half-written files of a capture that ends early, by an interrupt as well."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, FluxCapture)
        for one in pl_module.sets:
            one.writer.abandon()


class FluxCapture(LightningModule):
    """Generates the images of a `PromptData` and leaves them, and tokens at sites × steps, as shard sets in `folder`.

    `folder` holds `generation.json`, `prompts.jsonl`, `images/` and `<site>/step-<step>/`. A capture that was
    interrupted goes on at the first shard that is not whole; sites and steps may be added to a finished one.

    Args:
        model: a diffusers pipeline folder or a hub id.
        folder: where the sets go.
        sites: module paths inside the transformer, see `fluxsae.spec.Site`.
        steps: 0-based denoising steps.
        height: pixels, a multiple of 16.
        width: pixels, a multiple of 16.
        n_steps: denoising steps in the schedule.
        guidance: FLUX's guidance scale.
        text_length: text tokens a prompt; by default what the model's T5 tokenizer was made for, at most 512.
        images: keep the pictures; without them the sampler stops after the last of `steps`.
        storage: how tokens are stored.
        dtype: the model's; by default float32 on a CPU and bfloat16 elsewhere.
        keep_embeddings: keep prompt embeddings in `folder/embeddings`, so that no prompt is ever encoded twice;
            for FLUX.1 at 512 tokens that is 4 MiB a prompt.
    """

    def __init__(
        self,
        model: str,
        folder: Path,
        sites: list[str],
        steps: list[int],
        height: int = 256,
        width: int = 256,
        n_steps: int = 20,
        guidance: float = 3.5,
        text_length: int | None = None,
        images: bool = True,
        storage: Storage = "bf16",
        dtype: DType | None = None,
        keep_embeddings: bool = True,
    ) -> None:
        super().__init__()
        token_grid(height, width)
        if n_steps < 1:
            raise ValueError(f"n_steps is {n_steps}; a schedule needs at least 1 step.")
        for step in steps:
            check_step(step, n_steps)
        if text_length is not None and not 1 <= text_length <= MAX_TEXT_LENGTH:
            raise ValueError(f"text_length is {text_length}; FLUX reads 1 to {MAX_TEXT_LENGTH} text tokens.")
        if not math.isfinite(guidance):
            raise ValueError(f"guidance is {guidance}; it must be a finite number, such as 3.5.")
        self.sites = list(dict.fromkeys(map(parse_site, sites)))
        self.steps = sorted(set(steps))
        if not images and not (self.sites and self.steps):
            raise ValueError("there is nothing to capture: name sites and steps, or set images to true.")
        if bool(self.sites) != bool(self.steps):
            raise ValueError(
                f"sites {sites} and steps {steps} are taken together; name at least one of each, or neither."
            )
        self.model = model
        self.folder = Path(folder)
        self.height = height
        self.width = width
        self.n_steps = n_steps
        self.guidance = guidance
        self.text_length = text_length
        self.images = images
        self.storage: Storage = storage
        self.dtype_name = dtype
        self.keep_embeddings = keep_embeddings
        self.sets: list[CaptureSet] = []
        self._n_made = 0
        self._started = math.nan

    def configure_callbacks(self) -> list[Callback]:
        return [OneRunOnly(self.folder), AbandonParts()]

    def setup(self, stage: str) -> None:
        """Everything that can be refused before weights are loaded: sites, and a folder that holds something else."""
        skeleton = transformer_skeleton(self.model)
        for site in self.sites:
            find_module(skeleton, site)
        self.data = self._prompt_data()
        self.spec = self._generation_spec(self.data)
        self._claim_folder()
        self.sets = self._open_sets()
        self._started = time.monotonic()

    def predict_step(self, batch: RequestBatch, batch_idx: int = 0) -> int:
        """How many images were made: none when every set already has the batch's shard."""
        samples = self.data.samples(batch.shard)
        pending = [one for one in self.sets if not one.writer.is_complete(batch.shard, samples)]
        if not pending:
            return 0
        self._make(batch, pending)
        self._n_made += len(batch.requests)
        return len(batch.requests)

    def on_predict_end(self) -> None:
        """Once every process is done, the first writes each set's metadata: a set that has it is whole."""
        seconds = time.monotonic() - self._started
        logger.info(
            "made %d images in %.0f s (%.2f images/s)", self._n_made, seconds, self._n_made / max(seconds, 1e-9)
        )
        self.trainer.strategy.barrier("captured")
        if self.trainer.is_global_zero:
            for one in self.sets:
                one.writer.finalise(self.data.n_shards)
            for left_over in (self.folder / "embeddings").glob(".*"):  # of a process that was killed
                left_over.unlink()
        self.trainer.strategy.barrier("finalised")

    @cached_property
    def _pipe_and_embeddings(self) -> tuple[FluxPipeline, EmbeddingCache]:
        """Loaded when first needed: a finished capture that is started again loads nothing."""
        dtype = getattr(torch, self.spec.dtype)
        pipe = load_pipeline(self.model, dtype=dtype, device=self.device)
        kept = self.folder / "embeddings" if self.keep_embeddings else None
        return pipe, EmbeddingCache(kept, pipe, self.spec.model_hash, self.spec.text_length)

    def _make(self, batch: RequestBatch, pending: Sequence[CaptureSet]) -> None:
        pipe, embeddings = self._pipe_and_embeddings
        keys = [(one.site, one.step) for one in pending if one.site is not None]
        steps = [step for _, step in keys]
        images = len(keys) < len(pending)
        with record(pipe, sorted({site for site, _ in keys}), steps) as tape:
            made = generate(
                pipe,
                embeddings.get([request.prompt for request in batch.requests]),
                [request.seed for request in batch.requests],
                height=self.height,
                width=self.width,
                n_steps=self.n_steps,
                guidance=self.guidance,
                text_length=self.spec.text_length,
                images=images,
                last_step=None if images else max(steps),
            )
        for one in pending:
            payloads = made.images if one.site is None else tape[one.site, one.step]
            _write(one.writer, batch, payloads)

    def _prompt_data(self) -> PromptData:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, PromptData):
            raise ValueError(f"FluxCapture takes its prompts from a PromptData, not from {type(data).__name__}.")
        return data

    def _generation_spec(self, data: PromptData) -> GenerationSpec:
        frame = load_frame(self.model)
        text_length = self.text_length or min(frame.tokenizer_2.model_max_length, MAX_TEXT_LENGTH)
        return GenerationSpec(
            model=str(self.model),
            model_hash=weights_identity(self.model),
            height=self.height,
            width=self.width,
            n_steps=self.n_steps,
            guidance=self.guidance,
            shift=time_shift(frame.scheduler, token_grid(self.height, self.width).n_tokens),
            text_length=text_length,
            dtype=self.dtype_name or ("float32" if self.device.type == "cpu" else "bfloat16"),
            prompts_hash=prompts_hash(data.prompts),
            repetitions=data.repetitions,
            base_seed=data.base_seed,
        )

    def _claim_folder(self) -> None:
        """Write what this capture is. ValueError when the folder holds another, naming each field and both values."""
        path = self.folder / GENERATION
        values = {
            "spec": self.spec.to_dict(),
            "prompts": str(self.data.path),
            "n_prompts": len(self.data.prompts),
            "n_images": self.data.n_images,
            "images_per_shard": self.data.images_per_shard,
        }
        if path.exists():
            _refuse_another(path, self.spec, self.data.images_per_shard)
        if self.trainer.is_global_zero:
            # Always: attributes may have been corrected since, which changes no image.
            remove_parts(self.folder / "prompts.jsonl")
            remove_parts(path)
            lines = [json.dumps(_prompt_line(prompt), ensure_ascii=False) + "\n" for prompt in self.data.prompts]
            write_text(self.folder / "prompts.jsonl", "".join(lines))
            write_json(path, values)

    def _open_sets(self) -> list[CaptureSet]:
        per_shard = self.data.images_per_shard
        sets = [
            CaptureSet(
                ShardWriter(
                    set_folder(self.folder, site, step),
                    CaptureSpec(self.spec, str(site), step),
                    "tokens",
                    self.storage,
                    per_shard,
                ),
                str(site),
                step,
            )
            for site in self.sites
            for step in self.steps
        ]
        if self.images:
            writer = ShardWriter(self.folder / "images", self.spec, "images", self.storage, per_shard)
            sets.append(CaptureSet(writer))
        return sets


def set_folder(folder: Path, site: str | Site, step: int) -> Path:
    """Where a capture's folder holds the tokens of a site at a step, with "@" for ":", which not all systems allow."""
    return folder / str(site).replace(":", "@") / f"step-{step:02d}"


def _write(
    writer: ShardWriter, batch: RequestBatch, payloads: Float[Tensor, "B T D"] | list[Image.Image] | None
) -> None:
    assert payloads is not None
    if isinstance(payloads, Tensor):
        payloads = payloads.cpu()  # once for the batch
    for request, payload in zip(batch.requests, payloads, strict=True):
        writer.add(batch.shard, SampleRecord(*request), payload)
    if batch.last_of_shard:
        writer.close_shard(batch.shard)


def _refuse_another(path: Path, spec: GenerationSpec, images_per_shard: int) -> None:
    """ValueError when `path` tells of another generation, or of shards of another size."""
    values = read_json(path)
    try:
        found, found_size = GenerationSpec.from_dict(values["spec"]), values["images_per_shard"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a capture's record (no {error}); remove its folder or name another."
        ) from error
    other = differences(found, spec)
    if found_size != images_per_shard:
        other.append(f"images_per_shard: {found_size!r} != {images_per_shard!r}")
    if other:
        raise ValueError(
            f"{path.parent} holds another capture ({'; '.join(other)}); name another folder or remove this one."
        )


def _prompt_line(prompt: Prompt) -> dict[str, Any]:
    return {"id": prompt.id, "prompt": prompt.text, "attributes": prompt.attributes}
