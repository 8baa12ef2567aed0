"""Captured tokens in the device's memory, normalised, with validation and test tokens of prompts of their own.

Legend: N tokens, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fluxsae.data.activations import split_by_prompt
from fluxsae.shards.read import ShardSet


class Tokens(NamedTuple):
    """Rates are chosen on `validation` and results reported on `test`; no prompt is on two sides."""

    train: Float[Tensor, "N D"]
    validation: Float[Tensor, "N D"]
    test: Float[Tensor, "N D"]


def load_tokens(folder: Path, n_tokens: int | None, held_out: float, device: torch.device) -> Tokens:
    """All tokens of a shard set, the first `n_tokens` of the training prompts.

    Raises ValueError when there are fewer.
    """
    shards = ShardSet.open(folder, "tokens")
    train, validation, test = split_images(shards, held_out)
    available = len(train) * shards.spec.n_tokens
    if n_tokens is not None and n_tokens > available:
        raise ValueError(
            f"{folder} holds {available} training tokens, fewer than the {n_tokens} asked for; "
            "lower --n-tokens or capture more prompts."
        )
    train = train[: None if n_tokens is None else -(-n_tokens // shards.spec.n_tokens)]
    return Tokens(*(_load(shards, images, device) for images in (train, validation, test)))


def split_images(shards: ShardSet, held_out: float) -> tuple[list[int], list[int], list[int]]:
    """Images for training, validation and test; of the held-out prompts, every second one is for the test."""
    split = split_by_prompt(shards.records, held_out)
    tested = set(sorted({shards.records[image].prompt for image in split.held_out})[::2])
    sides: tuple[list[int], list[int]] = ([], [])
    for image in split.held_out:
        sides[shards.records[image].prompt in tested].append(image)
    return split.train, *sides


def _load(shards: ShardSet, images: list[int], device: torch.device, chunk: int = 2048) -> Float[Tensor, "N D"]:
    mean, scale = shards.statistics.mean.float().to(device), float(shards.statistics.scale)
    parts = []
    for start in range(0, len(images), chunk):
        tokens = shards.tokens_batch(images[start : start + chunk]).flatten(0, 1)
        parts.append((tokens.to(device).float() - mean) * scale)
    return torch.cat(parts)
