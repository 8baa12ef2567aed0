"""Checks a shard set from the first byte to the last: sizes, checksums, members, records, shapes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fluxsae.files import sha256_file
from fluxsae.shards.format import IMAGE, RECORD, TOKENS, ShardEntry, sample_key
from fluxsae.shards.read import ShardSet
from fluxsae.shards.tar import index_tar, map_tar


class Problem(NamedTuple):
    """Something wrong with a file, in a sentence that names its member where there is one."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def verify(folder: str | Path) -> list[Problem]:
    """Compare a finished set with its checksums. The result lists problems, at most one for each image.

    An empty list means that all is well. Raises FileNotFoundError or ValueError, as `ShardSet.open` does, when there is
    no readable metadata.
    """
    shards = ShardSet.open(folder, complete=False)
    return [problem for entry in shards.metadata.shards for problem in _shard_problems(shards, entry)]


def _shard_problems(shards: ShardSet, entry: ShardEntry) -> Iterator[Problem]:
    path = shards.folder / entry.name
    if not path.is_file():
        yield Problem(entry.name, "it is missing")
        return
    if path.stat().st_size != entry.bytes:
        yield Problem(entry.name, f"it has {path.stat().st_size} bytes, expected {entry.bytes}")
        return
    if sha256_file(path) != entry.sha256:
        yield Problem(entry.name, "its checksum is not the one in the metadata")
    try:
        found = set(index_tar(map_tar(path), path))
    except ValueError as error:
        yield Problem(entry.name, str(error))
        return
    payload = TOKENS if shards.metadata.kind == "tokens" else IMAGE
    images = range(entry.first_image, entry.first_image + entry.samples)
    expected = {f"{sample_key(image)}.{extension}" for image in images for extension in (payload, RECORD)}
    yield from (Problem(entry.name, f"member {name} does not belong here") for name in sorted(found - expected))
    for image in images:
        try:
            what = _sample_problem(shards, image)
        except ValueError as error:
            what = str(error).removeprefix(f"{path}: ")
        if what is not None:
            yield Problem(entry.name, what)


def _sample_problem(shards: ShardSet, image: int) -> str | None:
    shards.record(image)
    if shards.metadata.kind == "images":
        shards.image(image)
        return None
    if not bool(torch.isfinite(shards.tokens(image)).all()):
        return f"the tokens of image {image} hold NaN or infinite values"
    return None
