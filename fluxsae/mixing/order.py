"""The order of training tokens: which images are mixed with each other, and which token comes when.

Legend: N tokens of a chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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

    Place i of the order is token order[i] of all their tokens; the first `n_skipped` places are not wanted.
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
    n_chunks = -(-len(mine) // images_at_once)
    for i in range(n_chunks):
        some = mine[len(mine) * i // n_chunks : len(mine) * (i + 1) // n_chunks]
        order = torch.randperm(len(some) * n_tokens, generator=generator)
        if n_skipped < len(order):
            yield Chunk(sorted(some), _when_sorted(some, order, n_tokens), n_skipped, i == n_chunks - 1)
        n_skipped = max(0, n_skipped - len(order))


def largest_chunk(n_images: int, images_at_once: int) -> int:
    """Images of the largest of the chunks that `draw_chunks` makes of so many."""
    return -(-n_images // max(1, -(-n_images // images_at_once)))


def _when_sorted(images: Sequence[int], order: Int64[Tensor, "N"], n_tokens: int) -> Int64[Tensor, "N"]:
    """The order of the same tokens when the images have been sorted."""
    begin = torch.tensor(images).argsort().argsort() * n_tokens
    return (begin[:, None] + torch.arange(n_tokens)).flatten()[order]


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, unlike for neighbouring ones."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
