"""Scores every image on every feature: S[i, f] is the largest code of feature f over image i's tokens.

Legend: I images, B images of a batch, T tokens an image, D width, F features.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from fluxsae.data import ActivationData, TokenBatch
from fluxsae.files import unknown_key
from fluxsae.records import WHICH_IMAGES, CaptureSpec, GenerationSpec, differences
from fluxsae.sae import PlainPooling, Pooled, Pooling, load_sae, pooling_of
from fluxsae.shards import ShardSet

_logger = logging.getLogger(__name__)

MAY_DIFFER = ("site", "step", *(f.name for f in fields(GenerationSpec) if f.name not in ("model", *WHICH_IMAGES)))


class ImageScores(NamedTuple):
    """What the callbacks get of a batch. `prompts` has one number a prompt text: equal numbers, equal prompts.

    `fired` says on how many of an image's tokens a feature has a code. Codes themselves are nowhere in one piece.
    """

    images: Int[Tensor, "B"]
    prompts: Int[Tensor, "B"]
    scores: Float[Tensor, "B F"]
    fired: Int[Tensor, "B F"]


class SAEScoring(LightningModule):
    """Pools the codes of captured tokens and hands scores to the callbacks; run it with `predict` on `ActivationData`.

    The batches themselves are not kept: what callbacks write is the result, and memory does not grow with the data.
    `pooling` is how, from the start of a run on, also for callbacks that want codes of a few features.

    Args:
        sae: folder of an SAE, or a `.pt` checkpoint with `model_state_dict` and `config`.
        allow: what may differ between the tokens' capture and that which the SAE was trained on, such as
            `[step, height, width]`. Other prompts and seeds always may; another width of tokens never.
        fused: with `precision: bf16-mixed` on an NVIDIA GPU, encode and pool at once by hand-made kernels, if they
            agree with PyTorch's on the first image; false for PyTorch's alone.
    """

    def __init__(self, sae: Path, allow: list[str] | None = None, fused: bool = True) -> None:
        super().__init__()
        unknown = sorted(set(allow or ()) - set(MAY_DIFFER))
        if unknown:
            raise ValueError(unknown_key(unknown[0], MAY_DIFFER, "allow", what="field"))
        self.sae = load_sae(sae)
        self.path = sae
        self.fused = fused
        self.pooling: Pooling = PlainPooling(self.sae)
        self._unproven = False
        self.allow = tuple(allow or ())

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Pooled:
        return self.pooling.pool(tokens)

    def on_predict_start(self) -> None:
        """ValueError when the tokens were captured in another way than those that the SAE was trained on."""
        shards = scored_shards(self.trainer)
        names = f"the SAE at {self.path}", f"the shards at {shards.folder}"
        check_spec(self.sae.spec, shards.spec, *names, ignore=(*WHICH_IMAGES, *self.allow))
        if shards.statistics.mean.numel() != self.sae.d_in:
            raise ValueError(
                f"the shards at {shards.folder} hold tokens of width {shards.statistics.mean.numel()}, "
                f"the SAE at {self.path} reads width {self.sae.d_in}; use the SAE of this site."
            )
        self.trainer.predict_loop.return_predictions = False  # scores of all images would fill the memory
        if self.fused:
            self.pooling = pooling_of(self.sae, str(self.trainer.precision))
        self._unproven = type(self.pooling) is not PlainPooling

    def predict_step(self, batch: TokenBatch) -> ImageScores | Int[Tensor, "B"]:
        """The scores of a batch; where `only` narrows the data, which whoever wants scores refuses, just its images."""
        if self.trainer.datamodule.only is not None:  # type: ignore[attr-defined]
            return batch.images
        if self._unproven:
            self._prove(batch.tokens[:1])
        shards = scored_shards(self.trainer)
        keys = [prompt_key(shards.record(image).prompt) for image in batch.images.tolist()]
        prompts = torch.tensor(keys, device=batch.images.device)
        scores, fired = self(batch.tokens)
        if not bool(torch.isfinite(scores).all()):
            where = shards.first_not_finite(batch.images.tolist())
            raise FloatingPointError(f"a score is NaN or infinite. {where or f'The SAE at {self.path} is damaged'}.")
        return ImageScores(batch.images, prompts, scores, fired)

    def _prove(self, tokens: Float[Tensor, "1 T D"]) -> None:
        """Go on by PyTorch where kernels, which few of all GPUs have run, find grossly other scores of an image."""
        self._unproven = False
        plain = PlainPooling(self.sae)
        expected = plain.pool(tokens).scores
        off, length = float((self(tokens).scores - expected).norm()), float(expected.norm())
        if isfinite(length) and not off <= 0.1 * length:  # rounding, and which of equal codes is kept, make less
            _logger.warning(
                f"scoring goes on by PyTorch: fused scores are off by {off:.3g} of {length:.3g} on this GPU; "
                "please report this."
            )
            self.pooling = plain


def check_spec(
    ours: CaptureSpec | None, theirs: CaptureSpec, our_name: str, their_name: str, ignore: Collection[str] = ()
) -> None:
    """ValueError naming each field in which two specs differ; the unknown spec of a `.pt` checkpoint agrees with any."""
    different = differences(ours, theirs, ignore) if ours is not None else []
    if different:
        raise ValueError(
            f"{our_name} and {their_name} do not belong together ({'; '.join(different)}); capture with the settings "
            "of the one, fit an SAE on the other, or name what may differ under `allow`."
        )


def scored_shards(trainer: Trainer) -> ShardSet:
    """The shard set being scored. ValueError when the trainer runs on other data than `ActivationData`."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, ActivationData):
        raise ValueError(f"scoring reads ActivationData, not {type(data).__name__}; pass it as the datamodule.")
    return data.shard_set


def all_shards(trainer: Trainer) -> ShardSet:
    """`scored_shards`, when all their images are scored. ValueError where the data is narrowed by `only`."""
    shards = scored_shards(trainer)
    if trainer.datamodule.only is not None:  # type: ignore[attr-defined]
        raise ValueError("scores and statistics are of all images but the data's `only` is set; leave it out here.")
    return shards


def prompt_key(prompt: str) -> int:
    """A 63-bit number for a prompt's text, so that the unique-prompt rule needs no table of prompts."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") >> 1
