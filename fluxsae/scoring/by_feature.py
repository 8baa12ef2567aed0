"""S once more, in the order of features and without its zeros: what `Scores.of_feature` reads where it is there.

Legend: I images, F features, Z scores above 0, R images of a block.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Int32, Int64

from fluxsae.files import whole_file

OFFSETS, IMAGES, VALUES = "by-feature-offsets.npy", "by-feature-images.npy", "by-feature-values.npy"
FILES = (OFFSETS, IMAGES, VALUES)
_BLOCK = 2**24
"""Numbers of S that are in memory together."""


class FeatureScores(NamedTuple):
    """The images on which a feature is active, ascending, and its scores there; it is 0 on all others."""

    images: Int32[np.ndarray, "Z"]
    values: Float32[np.ndarray, "Z"]


def write_by_feature(matrix: Float[np.ndarray, "I F"], folder: Path) -> None:
    """Leave S in the order of features in three files, of which the offsets are written last.

    S is read twice, a block of images at a time: to count each feature's images, and to put them in their places.
    """
    offsets = np.concatenate([[0], np.cumsum(_n_active(matrix))]).astype(np.int64)
    (folder / OFFSETS).unlink(missing_ok=True)
    with ExitStack() as files:
        images = _map(files, folder / IMAGES, int(offsets[-1]), np.dtype(np.int32))
        values = _map(files, folder / VALUES, int(offsets[-1]), np.dtype(np.float32))
        _fill(matrix, offsets[:-1].copy(), images, values)
    with whole_file(folder / OFFSETS) as temporary:
        np.save(temporary, offsets)


def read_by_feature(folder: Path, feature: int) -> FeatureScores:
    """One feature's scores, with one read a file. Whether S was written by feature says `has_by_feature`."""
    begin, end = np.load(folder / OFFSETS, mmap_mode="r")[feature : feature + 2]
    parts = (np.load(folder / name, mmap_mode="r")[begin:end] for name in (IMAGES, VALUES))
    return FeatureScores(*(np.array(part) for part in parts))


def has_by_feature(folder: Path) -> bool:
    return (folder / OFFSETS).exists()


def _n_active(matrix: Float[np.ndarray, "I F"]) -> Int64[np.ndarray, "F"]:
    counts = np.zeros(matrix.shape[1], np.int64)
    for begin, end in _blocks(matrix):
        counts += np.count_nonzero(matrix[begin:end], axis=0)
    return counts


def _fill(
    matrix: Float[np.ndarray, "I F"],
    ends: Int64[np.ndarray, "F"],
    images: Int32[np.ndarray, "Z"],
    values: Float32[np.ndarray, "Z"],
) -> None:
    """Put each block's scores behind those of their features; `ends` says where these end, and moves along."""
    for begin, end in _blocks(matrix):
        by_feature = np.ascontiguousarray(matrix[begin:end].T)
        features, rows = np.nonzero(by_feature)
        counts = np.bincount(features, minlength=len(ends))
        before = np.cumsum(counts) - counts
        places = np.arange(len(features)) + np.repeat(ends - before, counts)
        images[places] = begin + rows
        values[places] = by_feature[features, rows]
        ends += counts


def _blocks(matrix: Float[np.ndarray, "I F"]) -> list[tuple[int, int]]:
    size = max(1, _BLOCK // matrix.shape[1])
    return [(begin, min(begin + size, len(matrix))) for begin in range(0, len(matrix), size)]


def _map(files: ExitStack, path: Path, size: int, dtype: np.dtype) -> Int[np.ndarray, "Z"] | Float[np.ndarray, "Z"]:
    temporary = files.enter_context(whole_file(path))
    if size == 0:  # which no memory map can be of
        np.save(temporary, np.zeros(0, dtype))
        return np.zeros(0, dtype)
    return np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=(size,))
