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
    """What the callbacks get of a batch. `prompts` has one number a prompt text: equal numbers, equal prompts.

    `fired` says on how many of an image's tokens a feature has a code. Codes themselves are nowhere in one piece.
    """

    images: Int[Tensor, "B"]
    prompts: Int[Tensor, "B"]
    scores: Float[Tensor, "B F"]
    fired: Int[Tensor, "B F"]


class SAEScoring(CodeReading):
    """Pools the codes of captured tokens and hands scores to the callbacks; run it with `predict` on `ActivationData`.

    The batches themselves are not kept: what callbacks write is the result, and memory does not grow with the data.
    `top` are the lists of top images that callbacks ask for when a run starts, and read when it has ended.
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
