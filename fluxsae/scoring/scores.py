"""S, the scores of images on features, as it lies on disk.

Legend: I images, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from fluxsae.files import read_csv, read_json
from fluxsae.records import CaptureSpec
from fluxsae.scoring.by_feature import FeatureScores, has_by_feature, read_by_feature

MATRIX, IMAGES, SUMMARY = "matrix.npy", "images.csv", "scores.json"
IMAGE_COLUMNS = ("image", "prompt_id", "repetition", "seed", "prompt")


@dataclass(frozen=True)
class Scores:
    """The scores S of a capture, as the scores stage wrote them.

    `matrix` [images, features] is memory-mapped and read-only. Row i of `matrix` belongs to row i of `images`. That row
    has `image`, `prompt_id`, `repetition`, `seed`, `prompt` and the prompt's attributes, all as text.
    """

    folder: Path
    matrix: Float[np.ndarray, "I F"]
    images: list[dict[str, str]]
    spec: CaptureSpec

    @classmethod
    def open(cls, folder: str | Path) -> Scores:
        """FileNotFoundError when there are no finished scores, ValueError when the files do not belong together."""
        folder = Path(folder)
        if not (folder / SUMMARY).exists():
            raise FileNotFoundError(f"there are no finished scores in {folder}; run the scores stage first.")
        summary = read_json(folder / SUMMARY)
        matrix = np.load(folder / MATRIX, mmap_mode="r")
        images = read_csv(folder / IMAGES)
        if matrix.shape != (len(images), summary["n_features"]):
            raise ValueError(
                f"{folder / MATRIX} has shape {matrix.shape}, expected {(len(images), summary['n_features'])} "
                f"from {IMAGES} and {SUMMARY}; run the scores stage again."
            )
        return cls(folder, matrix, images, CaptureSpec.from_dict(summary["spec"]))

    def of_feature(self, feature: int) -> FeatureScores:
        """The images with a score above 0 for this feature, ascending, and these scores.

        Scores that were written with `by_feature: true` are read in one piece. Otherwise a page is read for each image.
        Raises IndexError for a feature that does not exist.
        """
        n_features = self.matrix.shape[1]
        if not 0 <= feature < n_features:
            raise IndexError(f"feature {feature} is not in {self.folder}, which has features 0 to {n_features - 1}.")
        if has_by_feature(self.folder):
            return read_by_feature(self.folder, feature)
        column = np.array(self.matrix[:, feature])
        images = np.flatnonzero(column).astype(np.int32)
        return FeatureScores(images, column[images])
