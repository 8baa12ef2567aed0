"""An SAE over captured tokens: what scores and maps have in common before the first batch.

Legend: T tokens an image, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import fields
from math import isfinite
from pathlib import Path

from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from fluxsae.data import ActivationData
from fluxsae.files import unknown_key
from fluxsae.records import WHICH_IMAGES, CaptureSpec, GenerationSpec, differences
from fluxsae.sae import PlainPooling, Pooling, load_sae, pooling_of
from fluxsae.shards import ShardSet

_logger = logging.getLogger(__name__)

MAY_DIFFER = ("site", "step", *(f.name for f in fields(GenerationSpec) if f.name not in ("model", *WHICH_IMAGES)))


class CodeReading(LightningModule):
    """What `SAEScoring` and `FeatureMapping` share: it loads an SAE, checks the tokens, and chooses how codes are made.

    `pooling` computes the codes, from the start of a run.

    Args:
        sae: folder of an SAE, or a `.pt` checkpoint with `model_state_dict` and `config`.
        allow: what may differ between this capture and the one that the SAE was trained on, such as
            `[step, height, width]`. Prompts and seeds may always differ, and the width of tokens never.
        fused: compute codes by kernels, with `precision: bf16-mixed` on an NVIDIA GPU, if they agree with PyTorch on
            the first image. False always uses PyTorch.
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
        self._unchecked = False
        self.allow = tuple(allow or ())

    def on_predict_start(self) -> None:
        """ValueError when the tokens were captured in another way than those that the SAE was trained on."""
        shards = shards_of(self.trainer)
        names = f"the SAE at {self.path}", f"the shards at {shards.folder}"
        check_spec(self.sae.spec, shards.spec, *names, ignore=(*WHICH_IMAGES, *self.allow))
        if shards.statistics.mean.numel() != self.sae.d_in:
            raise ValueError(
                f"the shards at {shards.folder} hold tokens of width {shards.statistics.mean.numel()}, "
                f"the SAE at {self.path} reads width {self.sae.d_in}; use the SAE of this site."
            )
        self.trainer.predict_loop.return_predictions = False  # those of all images would fill the memory
        if self.fused:
            self.pooling = pooling_of(self.sae, str(self.trainer.precision))
        self._unchecked = type(self.pooling) is not PlainPooling

    def check_against_pytorch(self, tokens: Float[Tensor, "B T D"]) -> None:
        """Once a run, go on by PyTorch where kernels, which few of all GPUs have run, find grossly other scores."""
        if not self._unchecked:
            return
        self._unchecked = False
        plain, first = PlainPooling(self.sae), tokens[:1]
        expected = plain.pool(first).scores
        off, length = float((self.pooling.pool(first).scores - expected).norm()), float(expected.norm())
        if isfinite(length) and not off <= 0.1 * length:  # rounding, and which of equal codes is kept, make less
            _logger.warning(
                f"scoring goes on by PyTorch: fused scores are off by {off:.3g} of {length:.3g} on this GPU; "
                "please report this."
            )
            self.pooling = plain

    def check_finite(self, *, finite: bool, images: list[int], what: str) -> None:
        """FloatingPointError, telling which stored tokens are damaged, when a result of these images is not finite."""
        if not finite:
            where = shards_of(self.trainer).first_not_finite(images)
            raise FloatingPointError(f"{what} is NaN or infinite. {where or f'The SAE at {self.path} is damaged'}.")


def check_spec(
    ours: CaptureSpec | None, theirs: CaptureSpec, our_name: str, their_name: str, ignore: Collection[str] = ()
) -> None:
    """ValueError naming each field in which two specs differ; one that is not known agrees with any."""
    different = differences(ours, theirs, ignore) if ours is not None else []
    if different:
        raise ValueError(
            f"{our_name} and {their_name} do not belong together ({'; '.join(different)}); capture with the settings "
            "of the one, fit an SAE on the other, or name what may differ under `allow`."
        )


def shards_of(trainer: Trainer) -> ShardSet:
    """The shard set being read. ValueError when the trainer runs on other data than `ActivationData`."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, ActivationData):
        raise ValueError(f"scoring reads ActivationData, not {type(data).__name__}; pass it as the datamodule.")
    return data.shard_set


def all_shards(trainer: Trainer) -> ShardSet:
    """`shards_of`, when all their images are read. ValueError where the data is narrowed by `only`."""
    shards = shards_of(trainer)
    if trainer.datamodule.only is not None:  # type: ignore[attr-defined]
        raise ValueError(
            "scores and statistics are of all images but the data's `only` is set; leave it out here. "
            "Maps of some images are made by fluxsae.FeatureMapping and fluxsae.Overlays alone."
        )
    return shards
