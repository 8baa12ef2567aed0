"""Which prompts are held out of training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from fluxsae.shards import SampleRecord


class Split(NamedTuple):
    """Image indices of the training and the held-out prompts, ascending."""

    train: list[int]
    held_out: list[int]


def split_by_prompt(records: Sequence[SampleRecord], val_fraction: float) -> Split:
    """Hold out the prompts whose hash falls below `val_fraction`, at least one and never all.

    ValueError when there is only one prompt.
    """
    position = {record.prompt: _position(record.prompt) for record in records}
    if len(position) < 2:
        raise ValueError(f"the capture has {len(position)} prompt(s); capture at least 2, so that one can be held out.")
    ordered = sorted(position, key=position.__getitem__)
    n_held_out = sum(value < val_fraction for value in position.values())
    held_out = set(ordered[: min(max(n_held_out, 1), len(ordered) - 1)])
    return Split(
        train=[i for i, record in enumerate(records) if record.prompt not in held_out],
        held_out=[i for i, record in enumerate(records) if record.prompt in held_out],
    )


def _position(prompt: str) -> float:
    # A hash of more than the text alone: prompts may themselves have been chosen by a hash of their text.
    digest = hashlib.sha256(f"held-out prompts\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
