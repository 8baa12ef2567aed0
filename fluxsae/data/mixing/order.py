"""The order of training tokens: which images are mixed with each other, and which token comes when.

Legend: N tokens of a chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor


class Part(NamedTuple):
    """Which of `of` equal shares of the work this is."""

    rank: int
    of: int


WHOLE = Part(0, 1)


class Chunk(NamedTuple):
    """Images that are in memory together, ascending as they lie on disk, and the order in which their tokens come.

    Place i of the order is token order[i] of all their tokens; the first `n_skipped` places are not wanted. Which batch
    a token is in is drawn; within a batch tokens ascend, so that those of an image are copied to one place.
    """

    images: list[int]
    order: Int64[Tensor, "N"]
    n_skipped: int
    ends_epoch: bool


def draw_chunks(
    images: Sequence[int],
    n_tokens: int,
    *,
    images_at_once: int,
    batch_size: int,
    seed: int,
    epoch: int,
    part: Part = WHOLE,
    n_skipped: int = 0,
) -> Iterator[Chunk]:
    """The chunks of an epoch, but for its first `n_skipped` tokens; each image has `n_tokens`.

    (seed, epoch) permutes the images, of which each part takes its share, and with the part the tokens of each chunk.
    Chunks are as even as can be, of `images_at_once` at most: behind a short one, the next would come too late.
    """
    generator = torch.Generator().manual_seed(_mix(seed, epoch, 0))
    permuted = [images[i] for i in torch.randperm(len(images), generator=generator).tolist()]
    mine = permuted[part.rank :: part.of]
    generator.manual_seed(_mix(seed, epoch, 1 + part.rank))
    n_chunks = _n_chunks(len(mine), images_at_once)
    ends = [len(mine) * i // n_chunks for i in range(n_chunks + 1)]
    for begin, end in pairwise(ends):
        drawn = torch.randperm((end - begin) * n_tokens, generator=generator)
        if n_skipped < len(drawn):
            order = _by_batch(drawn, batch_size, begin * n_tokens % batch_size)
            yield Chunk(sorted(mine[begin:end]), order, n_skipped, end == len(mine))
        n_skipped = max(0, n_skipped - len(drawn))


def largest_chunk(n_images: int, images_at_once: int) -> int:
    """Images of the largest of the chunks that `draw_chunks` makes of so many."""
    return -(-n_images // _n_chunks(n_images, images_at_once))


def _n_chunks(n_images: int, images_at_once: int) -> int:
    return max(1, -(-n_images // images_at_once))


def _by_batch(drawn: Int64[Tensor, "N"], batch_size: int, n_before: int) -> Int64[Tensor, "N"]:
    """The tokens in order of the batches that the places `drawn` for them are in, the first of which has `n_before`."""
    batch = ((drawn + n_before) // batch_size).numpy()
    kind = np.int16 if batch.max() < 2**15 else np.int32  # of 16 bits, numpy sorts digit by digit
    return torch.from_numpy(batch.astype(kind).argsort(kind="stable"))


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, unlike for neighbouring ones."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
