"""Generates images from prompts and captures what modules of the transformer hold meanwhile, as shard sets.

Legend: B batch, T tokens an image, D width, H×W pixels of an image.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from fluxsae.capture.folder import (
    CaptureSet,
    check_or_record_generation,
    check_space,
    image_bytes,
    open_sets,
    set_folder,
    token_bytes,
)
from fluxsae.capture.progress import ProgressLog
from fluxsae.capture.prompt_data import GenerationRequest, PromptData, RequestBatch
from fluxsae.models import (
    EmbeddingCache,
    EmbeddingsAhead,
    FluxPipeline,
    TapeIsFull,
    generate,
    load_frame,
    load_pipeline,
    pictures,
    record,
    time_shift,
    to_device,
    token_shapes,
    transformer_skeleton,
    weights_identity,
)
from fluxsae.records import GenerationSpec, check_step, parse_site, prompts_hash, token_grid
from fluxsae.runtime import Background, HostCopy, OneRunOnly, side_by_side
from fluxsae.shards import SampleRecord, ShardSet, Storage, describe_channels

logger = logging.getLogger(__name__)

DType = Literal["float32", "bfloat16", "float16"]
MAX_TEXT_LENGTH = 512
"""The most text tokens that diffusers' FLUX pipeline takes."""


class AbandonParts(Callback):
    """Closes the files of a capture that ends early, by an interrupt as well: whole batches stay for the next."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, FluxCapture)
        pl_module.abandon()


class FluxCapture(LightningModule):
    """Generates the images of a `PromptData`, and stores them and the tokens at all `sites` and `steps` as shard sets.

    Run it with `predict`. `folder` then holds `generation.json`, `prompts.jsonl`, `images/` and one folder
    `<site>/step-<step>/` for each site and step. Run it again after an interruption, and it continues after the last
    batch that it wrote. Sites and steps can be added to a finished capture.

    Args:
        model: a diffusers pipeline folder, a hub id, or `bundled:tiny-flux`.
        folder: where the shard sets go.
        sites: module paths inside the transformer, see `fluxsae.Site`.
        steps: 0-based denoising steps.
        height: pixels, a multiple of 16.
        width: pixels, a multiple of 16.
        n_steps: denoising steps in the schedule.
        guidance: FLUX's guidance scale.
        text_length: text tokens of a prompt; by default the length of the model's T5 tokenizer, at most 512.
        images: whether to store the pictures. Without them the sampler stops after the last of `steps`.
        storage: how tokens are stored: `bf16`, `fp32` or `fp8`.
        not_finite: what to do about a NaN or an infinite value among the tokens of an image. `stop` stops the capture.
            `skip` leaves out that image's tokens at that site and step. The set lists skipped images, and no later
            stage reads them.
        dtype: `float32`, `bfloat16` or `float16`; by default float32 on a CPU and bfloat16 elsewhere.
        keep_embeddings: encode all prompts first and keep their embeddings in `folder/embeddings`. The text encoders
            leave the device before the first image is made. For FLUX.1 at 512 tokens a prompt takes 4 MiB on disk. If
            false, prompts are encoded when they are needed.
        compile: whether to compile the transformer's blocks; by default only on a GPU.
        offload_blocks: how many single-stream blocks stay in host memory and are copied to the device in every step.
            For FLUX.1 each of them saves 283 MB, except for two, which are on the device at a time.
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
        not_finite: Literal["stop", "skip"] = "stop",
        dtype: DType | None = None,
        keep_embeddings: bool = True,
        compile: bool | None = None,
        offload_blocks: int = 0,
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
        self.skip_not_finite = not_finite == "skip"
        self.dtype_name = dtype
        self.keep_embeddings = keep_embeddings
        self.compile_blocks = compile
        self.offload_blocks = offload_blocks
        self.sets: list[CaptureSet] = []
        self._background = Background()
        self._embeddings: EmbeddingsAhead | None = None
        self._n_made = 0
        self._started = math.nan

    def configure_callbacks(self) -> list[Callback]:
        return [AbandonParts(), OneRunOnly(self.folder)]  # parts go while the folder is still locked

    def setup(self, stage: str) -> None:
        """Everything that can be refused before weights are loaded: sites, a full disk, a folder of something else."""
        self.data = self._prompt_data()
        self.spec = self._generation_spec(self.data)
        skeleton = transformer_skeleton(self.model)
        shapes = token_shapes(skeleton, self.sites, self.spec.grid, self.spec.text_length)
        check_or_record_generation(self.folder, self.spec, self.data, write=False)
        keys = product(self.sites, self.steps)
        self.sets = open_sets(self.folder, self.spec, keys, self.storage, self.data, self.images, self.skip_not_finite)
        sizes = {str(site): token_bytes(*shape, self.storage) for site, shape in zip(self.sites, shapes, strict=True)}
        if self.trainer.is_global_zero:
            check_space(self.folder, [self._bytes_to_come(one, sizes) for one in self.sets])
        check_or_record_generation(self.folder, self.spec, self.data, write=self.trainer.is_global_zero)
        self._n_tokens = len(self.steps) * sum(shape.n_tokens for shape in shapes)
        self._background = Background()
        self._progress = ProgressLog()
        self._started = time.monotonic()

    def predict_step(self, batch: RequestBatch, batch_idx: int = 0) -> int:
        """How many images were made: none when every set already has the batch."""
        pending = self._pending(batch)
        if not pending:
            return 0
        self._make(batch, pending)
        self._n_made += len(batch.requests)
        n_bytes = sum(one.writer.n_bytes for one in self.sets)
        self._progress.show(self._n_made, len(self._requests_to_come), self._n_made * self._n_tokens, n_bytes)
        return len(batch.requests)

    def on_predict_end(self) -> None:
        """Once every process is done, the first writes each set's metadata: a set that has it is whole."""
        self._background.wait()
        self._stop()
        seconds = time.monotonic() - self._started
        logger.info(
            "made %d images in %.0f s (%.2f images/s)", self._n_made, seconds, self._n_made / max(seconds, 1e-9)
        )
        self.trainer.strategy.barrier("captured")
        if self.trainer.is_global_zero:
            for line in side_by_side(self._finish, self.sets):
                if line is not None:
                    logger.info("%s", line)
            for left_over in (self.folder / "embeddings").glob(".*"):  # of a process that was killed
                left_over.unlink()
        self.trainer.strategy.barrier("finalised")

    def _finish(self, one: CaptureSet) -> str | None:
        """Write a set's metadata; what is to be said about its channels, where it has grown."""
        one.writer.finalise(self.data.n_shards)
        if one.site is None or not one.missing:
            return None
        shards = ShardSet.open(set_folder(self.folder, one.site, one.step))
        return f"{one.site}, step {one.step}: {describe_channels(shards)}"

    def abandon(self) -> None:
        """Stop writing; what of a shard is on the disk in whole batches stays for the next run."""
        self._stop()
        for one in self.sets:
            one.writer.abandon()

    def _stop(self) -> None:
        """Return once no thread is at work any more."""
        if self._embeddings is not None:
            self._embeddings.close()
        self._background.stop()

    @cached_property
    def _pipe_and_embeddings(self) -> tuple[FluxPipeline, EmbeddingsAhead]:
        """Loaded when first needed: a finished capture that is started again loads nothing."""
        pipe = load_pipeline(self.model, dtype=getattr(torch, self.spec.dtype))
        kept = self.folder / "embeddings" if self.keep_embeddings else None
        cache = EmbeddingCache(kept, pipe, self.spec.model_hash, self.spec.text_length)
        if self.keep_embeddings:
            cache.encode_ahead([request.prompt for request in self._requests_to_come], self.device)
        compiled = self.device.type == "cuda" if self.compile_blocks is None else self.compile_blocks
        pipe = to_device(pipe, self.device, n_offloaded=self.offload_blocks, compiled=compiled)
        self._embeddings = EmbeddingsAhead(cache, self.device)
        return pipe, self._embeddings

    @cached_property
    def _requests_to_come(self) -> list[GenerationRequest]:
        """The images that this process has to make."""
        return [request for batch in self._batches_to_come for request in batch.requests]

    @cached_property
    def _batches_to_come(self) -> list[RequestBatch]:
        return [batch for batch in self.data.predict_dataloader() if self._pending(batch)]

    @cached_property
    def _following(self) -> dict[int, list[str]]:
        """The prompts of the batch that comes after that which begins with an image."""
        pairs = pairwise(self._batches_to_come)
        return {one.requests[0].image: [request.prompt for request in after.requests] for one, after in pairs}

    def _pending(self, batch: RequestBatch) -> list[CaptureSet]:
        """The sets that do not have all of the batch yet."""
        return [one for one in self.sets if one.lacks(batch)]

    def _make(self, batch: RequestBatch, pending: Sequence[CaptureSet]) -> None:
        """Make a batch's images and hand over what is to be written, without waiting for it or for the sampler."""
        pipe, embeddings = self._pipe_and_embeddings
        keys = [(one.site, one.step) for one in pending if one.site is not None]
        steps = [step for _, step in keys]
        images, pixels = len(keys) < len(pending), None
        sites = sorted({site for site, _ in keys})
        with record(pipe, sites, steps, stop_when_full=not images) as tape, suppress(TapeIsFull):
            pixels = generate(
                pipe,
                embeddings.get(
                    [request.prompt for request in batch.requests], self._following.get(batch.requests[0].image, ())
                ),
                [request.seed for request in batch.requests],
                height=self.height,
                width=self.width,
                n_steps=self.n_steps,
                guidance=self.guidance,
                text_length=self.spec.text_length,
                images=images,
            ).pixels
        made = [pixels if one.site is None else tape[one.site, one.step] for one in pending]
        copies = [HostCopy(tensor) for tensor in made if tensor is not None]
        self._background.put(partial(_write, batch, pending, copies))

    def _bytes_to_come(self, one: CaptureSet, sizes: dict[str, int]) -> int:
        size = image_bytes(self.spec) if one.site is None else sizes[one.site]
        return size * sum(self.data.samples(shard) - one.writer.kept(shard) for shard in one.missing)

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


def _write(batch: RequestBatch, pending: Sequence[CaptureSet], copies: Sequence[HostCopy]) -> None:
    side_by_side(lambda pair: _write_one(*pair, batch), list(zip(pending, copies, strict=True)))


def _write_one(one: CaptureSet, copy: HostCopy, batch: RequestBatch) -> None:
    values: Float[Tensor, "B T D"] | UInt8[Tensor, "B H W 3"] = copy.wait()
    payloads = pictures(values) if one.site is None else values
    for request, payload in zip(batch.requests, payloads, strict=True):
        if request.image >= one.end_of_kept(batch.shard):
            one.writer.add(batch.shard, SampleRecord(*request), payload)
    if batch.last_of_shard:
        one.writer.close_shard(batch.shard)
    else:
        one.writer.keep(batch.shard)
