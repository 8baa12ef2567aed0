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

MATRIX, IMAGES, SUMMARY = "matrix.npy", "images.csv", "scores.json"
IMAGE_COLUMNS = ("image", "prompt_id", "repetition", "seed", "prompt")


@dataclass(frozen=True)
class Scores:
    """The score matrix of a capture as it lies on disk.

    `matrix` is memory-mapped and read-only; row i belongs to row i of `images`, which has the columns
    image, prompt_id, repetition, seed, prompt and one a prompt attribute, all as text.
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
