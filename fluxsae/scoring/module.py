"""Scores every image on every feature: S[i, f] is the largest code of feature f over image i's tokens.

Legend: B images of a batch, T tokens an image, D width, F features.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from torch import Tensor

from fluxsae.data import TokenBatch
from fluxsae.sae import Pooled
from fluxsae.scoring.reading import CodeReading, shards_of
from fluxsae.scoring.top_lists import TopLists


class ImageScores(NamedTuple):
    """The scores of a batch, as callbacks get them.

    `images` are the images' numbers. Images with the same prompt have the same number in `prompts`. `fired` says on how
    many tokens of an image a feature has a code above 0. The codes themselves are not kept.
    """

    images: Int[Tensor, "B"]
    prompts: Int[Tensor, "B"]
    scores: Float[Tensor, "B F"]
    fired: Int[Tensor, "B F"]


class SAEScoring(CodeReading):
    """Computes the scores of captured images and hands them to callbacks. Run it with `predict` on `ActivationData`.

    The files that callbacks write are the result. Scores are not kept in memory, which does not grow with the number of
    images. `top` holds the lists of top images. Callbacks ask for them when a run starts and read them when it ends.

    Args:
        sae: folder of an SAE, or a `.pt` checkpoint with `model_state_dict` and `config`.
        allow: what may differ between this capture and the one that the SAE was trained on, such as
            `[step, height, width]`. Prompts and seeds may always differ, and the width of tokens never.
        fused: compute codes by kernels, with `precision: bf16-mixed` on an NVIDIA GPU, if they agree with PyTorch on
            the first image. False always uses PyTorch.
    """

    top: TopLists

    def setup(self, stage: str) -> None:
        """New lists for a run, before any callback asks for one."""
        self.top = TopLists()

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Pooled:
        return self.pooling.pool(tokens)

    def predict_step(self, batch: TokenBatch) -> ImageScores:
        self.check_against_pytorch(batch.tokens)
        shards = shards_of(self.trainer)
        keys = [prompt_key(shards.record(image).prompt) for image in batch.images.tolist()]
        prompts = torch.tensor(keys, device=batch.images.device)
        scores, fired = self(batch.tokens)
        self.check_finite(finite=bool(torch.isfinite(scores).all()), images=batch.images.tolist(), what="a score")
        return ImageScores(batch.images, prompts, scores, fired)

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self.top.add(outputs.images, outputs.prompts, outputs.scores)


def scoring_of(module: LightningModule, callback: object) -> SAEScoring:
    """The module that hands out scores. ValueError, for a callback that needs them, when it is another one."""
    if not isinstance(module, SAEScoring):
        raise ValueError(
            f"{type(callback).__name__} reads scores, which {type(module).__name__} does not make; "
            "name fluxsae.SAEScoring as the model."
        )
    return module


def prompt_key(prompt: str) -> int:
    """A 63-bit number for a prompt's text, so that the unique-prompt rule needs no table of prompts."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") >> 1
