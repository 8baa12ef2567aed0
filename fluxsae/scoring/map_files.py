"""Where on images features are active: their codes over the token grid, of many features, in one file.

Legend: P maps (each of a feature on an image), M maps of one feature or image, R × C token grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from fluxsae.files import whole_file
from fluxsae.records import Feature

MAPS, INDEX = "maps.npy", "maps-index.npy"


class FeatureMaps(NamedTuple):
    """A feature's codes over the token grids of its top images, best first."""

    feature: int
    images: tuple[int, ...]
    maps: Float[np.ndarray, "M R C"]


@dataclass(frozen=True)
class MapIndex:
    """What each map is of: row p is (feature, image). Features ascend, and a feature's images come best first."""

    pairs: Int[np.ndarray, "P 2"]

    @classmethod
    def of(cls, *selections: tuple[Sequence[Feature], int]) -> MapIndex:
        """The maps of selected features on their top images. A feature in two selections gets the larger number."""
        images: dict[int, tuple[int, ...]] = {}
        for rows, n_images in selections:
            for row in rows:
                images[row.feature] = max(images.get(row.feature, ()), row.top_images[:n_images], key=len)
        pairs = [(feature, image) for feature in sorted(images) for image in images[feature]]
        return cls(np.array(pairs, dtype=np.int64).reshape(-1, 2))

    def __len__(self) -> int:
        return len(self.pairs)

    def of_feature(self, feature: int) -> slice:
        """The rows of a feature's maps, which follow each other; none for one that has no maps."""
        begin, end = np.searchsorted(self.pairs[:, 0], [feature, feature + 1])
        return slice(int(begin), int(end))

    def of_image(self, image: int) -> Int[np.ndarray, "M"]:
        """The rows of all maps on an image."""
        begin, end = np.searchsorted(self._images, [image, image + 1])
        return self._by_image[begin:end]

    @cached_property
    def _by_image(self) -> Int[np.ndarray, "P"]:
        return self.pairs[:, 1].argsort(kind="stable")

    @cached_property
    def _images(self) -> Int[np.ndarray, "P"]:
        return self.pairs[self._by_image, 1]

    def save(self, folder: Path) -> None:
        with whole_file(folder / INDEX) as temporary:
            np.save(temporary, self.pairs)


@dataclass(frozen=True)
class MapFile:
    """The maps in a folder; `maps` is memory-mapped, so that a feature's are read when they are asked for."""

    index: MapIndex
    maps: Float[np.ndarray, "P R C"]

    @classmethod
    def open(cls, folder: str | Path) -> MapFile:
        """FileNotFoundError when the folder holds no maps, ValueError when the files do not belong together."""
        folder = Path(folder)
        for name in (MAPS, INDEX):
            if not (folder / name).exists():
                raise FileNotFoundError(f"there is no {name} in {folder}; run the overlays stage.")
        index, maps = MapIndex(np.load(folder / INDEX)), np.load(folder / MAPS, mmap_mode="r")
        if len(index) != len(maps):
            raise ValueError(
                f"{folder / MAPS} has {len(maps)} maps, expected {len(index)} from {INDEX}; "
                "run the overlays stage again."
            )
        return cls(index, maps)

    def of(self, feature: int, n_images: int | None = None) -> FeatureMaps:
        """A feature's maps on its best images, by default on all that have one."""
        rows = self.index.of_feature(feature)
        images = tuple(self.index.pairs[rows, 1].tolist())[:n_images]
        return FeatureMaps(feature, images, np.array(self.maps[rows][:n_images]))
