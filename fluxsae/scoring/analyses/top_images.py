"""The images on which each feature is strongest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from fluxsae.records import Column
from fluxsae.scoring.analysis import FeatureAnalysis
from fluxsae.scoring.module import SAEScoring
from fluxsae.scoring.top_lists import TopLists
from fluxsae.shards import ShardSet

COLUMN = Column("top_images", "ints", "the images on which it is strongest, best first")


class TopImages(FeatureAnalysis):
    """Fills in top_images of the features table: the images on which a feature is strongest, best first.

    Args:
        features: the features table.
        n_images: number of images for each feature.
        unique_prompts: take at most one image of each prompt.
    """

    columns = (COLUMN,)

    def __init__(self, features: Path, n_images: int = 9, unique_prompts: bool = True) -> None:
        if n_images < 1:
            raise ValueError(f"n_images is {n_images}, expected at least 1.")
        super().__init__(features)
        self.n_images = n_images
        self.unique_prompts = unique_prompts
        self._top: TopLists

    def begin(self, module: SAEScoring, shards: ShardSet) -> None:
        self._top = module.top
        self._top.ask(self.n_images, self.unique_prompts)

    def finish(self, trainer: Trainer) -> Mapping[str, Sequence[Any]]:
        return {COLUMN.name: self._top.ids(trainer, self.n_images, self.unique_prompts)}
