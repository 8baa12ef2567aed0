"""Reads codes of single features over the tokens of some images.

Legend: P maps, M maps of some images, B images of a batch, T tokens an image, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from torch import Tensor

from fluxsae.data import TokenBatch
from fluxsae.sae import Pooling
from fluxsae.scoring.map_files import MapIndex
from fluxsae.scoring.reading import CodeReading


class FeatureMapping(CodeReading):
    """Hands captured tokens to callbacks that map the codes of some features, such as `Overlays`.

    It computes no scores. Run it with `predict` on `ActivationData`; its `only` names the images to read.

    Args:
        sae: folder of an SAE, or a `.pt` checkpoint with `model_state_dict` and `config`.
        allow: what may differ between this capture and the one that the SAE was trained on, see `SAEScoring`.
        fused: compute codes by kernels where they can be used, see `SAEScoring`.
    """

    def predict_step(self, batch: TokenBatch) -> Int[Tensor, "B"]:
        """Which images the batch holds: their codes are to be had from `pooling`."""
        self.check_against_pytorch(batch.tokens)
        return batch.images


def reading_of(module: LightningModule, callback: object) -> CodeReading:
    """The module whose codes a callback maps. ValueError when it reads none."""
    if not isinstance(module, CodeReading):
        raise ValueError(
            f"{type(callback).__name__} maps codes, which {type(module).__name__} does not read; "
            "name fluxsae.FeatureMapping as the model."
        )
    return module


class Mapped(NamedTuple):
    """Some maps that were made together, and their rows in the file."""

    rows: Int[np.ndarray, "M"]
    maps: Float[np.ndarray, "M T"]


def map_images(
    index: MapIndex, pooling: Pooling, images: Int[Tensor, "B"], tokens: Float[Tensor, "B T D"]
) -> Mapped | None:
    """All maps on some images, brought to the host together; None where the index has none of them."""
    rows = [index.of_image(image) for image in images.tolist()]
    codes = [
        pooling.codes(one, torch.from_numpy(index.pairs[wanted, 0]).to(one.device)).detach().T
        for one, wanted in zip(tokens, rows, strict=True)
        if len(wanted)
    ]
    return Mapped(np.concatenate(rows), torch.cat(codes).cpu().numpy()) if codes else None
