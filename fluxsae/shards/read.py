"""Reads a shard set with random access.

Legend: B or I images, T tokens an image, D width.
"""

from __future__ import annotations

import io
import json
import mmap
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from fluxsae.records import CaptureSpec, GenerationSpec, Statistics
from fluxsae.shards.encoding import TokenLayout, decode_tokens, find_tokens
from fluxsae.shards.format import (
    IMAGE,
    RECORD,
    TOKENS,
    Kind,
    SampleRecord,
    ShardEntry,
    ShardMetadata,
    read_metadata,
    sample_key,
)
from fluxsae.shards.tar import Member, Tar, index_tar, open_tar

_INDICES = 128
"""Shards of which it is known where members lie: that takes half a kilobyte an image, which would add up."""
_MAPS = 128
"""Shards open at once: each holds two file descriptors, and a process has about a thousand."""


class Stored(NamedTuple):
    """Where the tokens of an image are stored: a member that starts at `start` of `tar`, and what lies in it."""

    tar: Tar
    start: int
    layout: TokenLayout


class ShardSet:
    """A finished shard set, with random access. Images are counted from 0 through all shards.

    It can be sent to worker processes.
    """

    def __init__(self, folder: Path, metadata: ShardMetadata) -> None:
        self.folder = folder
        self.metadata = metadata
        self._n_images = metadata.n_images
        self._first = [shard.first_image for shard in metadata.shards]
        self._tars: dict[int, Tar] = {}
        self._indices: OrderedDict[int, dict[str, Member]] = OrderedDict()  # the last used behind the others

    @classmethod
    def open(cls, folder: str | Path, kind: Kind | None = None, *, complete: bool = True) -> ShardSet:
        """Open a set, of one `kind` where that is given.

        FileNotFoundError when there is no finished set or (unless `complete` is False) a shard is missing,
        ValueError when it is of the other kind.
        """
        folder = Path(folder)
        metadata = read_metadata(folder)
        if kind not in (None, metadata.kind):
            raise ValueError(f"{folder} is a set of {metadata.kind}, expected {kind}; name the folder of the {kind}.")
        for shard in metadata.shards:
            if complete and not (folder / shard.name).is_file():
                raise FileNotFoundError(f"{folder / shard.name} is missing; restore it or capture again.")
        return cls(folder, metadata)

    def __len__(self) -> int:
        return self._n_images

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tars": {}}

    @cached_property
    def skipped(self) -> frozenset[int]:
        """Images whose tokens were not finite when they were captured; zeros are in their place."""
        return frozenset(image for shard in self.metadata.shards for image in shard.skipped)

    @cached_property
    def with_tokens(self) -> list[int]:
        """All other images, ascending."""
        return [image for image in range(len(self)) if image not in self.skipped]

    @property
    def generation(self) -> GenerationSpec:
        spec = self.metadata.spec
        return spec.generation if isinstance(spec, CaptureSpec) else spec

    @property
    def spec(self) -> CaptureSpec:
        """What was captured. ValueError for a set of images, which has only `generation`."""
        if not isinstance(self.metadata.spec, CaptureSpec):
            raise ValueError(
                f"{self.folder} is a set of images, which no site and step belong to; name a set of tokens."
            )
        return self.metadata.spec

    @property
    def statistics(self) -> Statistics:
        """Statistics of the tokens. ValueError for a set of images."""
        if self.metadata.statistics is None:
            raise ValueError(f"{self.folder} is a set of images and has no token statistics; name a set of tokens.")
        return self.metadata.statistics

    @cached_property
    def records(self) -> list[SampleRecord]:
        """The record of every image, in order."""
        return [self.record(image) for image in range(len(self))]

    def tokens(self, image: int) -> Float[Tensor, "T D"]:
        """The tokens of one image, bf16 or (where stored so) float32; read-only, they may share the file's memory."""
        shard, member = self._member(image, TOKENS)
        try:
            tokens = decode_tokens(self._map(shard), member.start, member.size)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(shard, member.name, str(error)) from error
        self._check_shape(shard, member, tuple(tokens.shape))
        return tokens

    def stored_tokens(self, image: int) -> Stored:
        """Where the tokens of one image lie. ValueError for a damaged one, as from `tokens`."""
        shard, member = self._member(image, TOKENS)
        try:
            layout = find_tokens(self._map(shard), member.start, member.size)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(shard, member.name, str(error)) from error
        self._check_shape(shard, member, layout.shape)
        return Stored(self._tar(shard), member.start, layout)

    def tar_of(self, image: int) -> Tar:
        """The open shard that holds an image."""
        return self._tar(bisect_right(self._first, image) - 1)

    def _check_shape(self, shard: int, member: Member, found: tuple[int, ...]) -> None:
        if found != self._token_shape:
            raise self._damaged(
                shard, member.name, f"its tokens have shape {list(found)}, expected {self._token_shape}"
            )

    @cached_property
    def _token_shape(self) -> tuple[int, int]:
        return (self.spec.n_tokens, self.statistics.mean.numel())

    def tokens_batch(self, images: Sequence[int]) -> Float[Tensor, "B T D"]:
        """The tokens of several images, copied into one tensor."""
        return torch.stack([self.tokens(image) for image in images])

    def image(self, image: int) -> Image.Image:
        """One picture of a set of images."""
        shard, member = self._member(image, IMAGE)
        expected = (self.generation.width, self.generation.height)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is compared before loading
                picture = Image.open(io.BytesIO(self._bytes(shard, member)), formats=("PNG",))
            if picture.size != expected:
                raise ValueError(f"it is {picture.size} pixels, expected {expected}")
            picture.load()
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise self._damaged(shard, member.name, str(error)) from error
        return picture

    def record(self, image: int) -> SampleRecord:
        """The record of one image, read from its shard."""
        shard, member = self._member(image, RECORD)
        try:
            record = SampleRecord.from_dict(json.loads(self._bytes(shard, member)))
        except (ValueError, RecursionError) as error:
            raise self._damaged(shard, member.name, str(error)) from error
        if record.image != image:
            raise self._damaged(shard, member.name, f"it describes image {record.image}")
        return record

    def shards_of(self, images: Sequence[int]) -> Int64[np.ndarray, "I"]:
        """The shard that holds each image, counted from 0."""
        return np.searchsorted(self._first, images, side="right") - 1

    @property
    def paths(self) -> list[Path]:
        """The tars, in order."""
        return [self.folder / entry.name for entry in self.metadata.shards]

    def path_of(self, image: int) -> Path:
        """The tar that holds an image."""
        return self.folder / self._entry(bisect_right(self._first, image) - 1).name

    def first_not_finite(self, images: Iterable[int]) -> str | None:
        """Where the first NaN or infinite value among the tokens of `images` is, in words; None when there is none."""
        for image in images:
            if not bool(torch.isfinite(self.tokens(image)).all()):
                return (
                    f"image {image} in {self.path_of(image)} (site {self.spec.site}, step {self.spec.step}) holds NaN "
                    "or infinite values: delete that file and capture again, which makes only what is missing"
                )
        return None

    def _bytes(self, shard: int, member: Member) -> bytes:
        return self._map(shard)[member.start : member.start + member.size]

    def _member(self, image: int, extension: str) -> tuple[int, Member]:
        if not 0 <= image < len(self):
            raise ValueError(f"image {image} is not in {self.folder}, which has images 0 to {len(self) - 1}.")
        shard = bisect_right(self._first, image) - 1
        name, index = f"{sample_key(image)}.{extension}", self._index(shard)
        if name not in index:
            raise self._damaged(shard, name, "it is missing")
        return shard, index[name]

    def _index(self, shard: int) -> dict[str, Member]:
        """Where a shard's members lie; known of those that were looked into last. Several threads may ask."""
        index = self._indices.get(shard)
        if index is None:
            index = index_tar(self._map(shard), self.folder / self._entry(shard).name)
            if len(self._indices) >= _INDICES:
                self._indices.popitem(last=False)
            self._indices[shard] = index
        else:
            with suppress(KeyError):  # another thread has dropped it
                self._indices.move_to_end(shard)
        return index

    def _map(self, shard: int) -> mmap.mmap:
        return self._tar(shard).map

    def _tar(self, shard: int) -> Tar:
        if shard not in self._tars:
            if len(self._tars) >= _MAPS:
                # The newest: whoever reads all shards over and over, in order, finds the others again. Tensors that
                # share a map's memory keep it alive.
                self._tars.popitem()
            self._tars[shard] = open_tar(self.folder / self._entry(shard).name, self._entry(shard).bytes)
        return self._tars[shard]

    def _entry(self, shard: int) -> ShardEntry:
        return self.metadata.shards[shard]

    def damaged(self, image: int, why: str) -> ValueError:
        """What to raise for an image whose tokens turn out to be damaged."""
        shard, member = self._member(image, TOKENS)
        return self._damaged(shard, member.name, why)

    def _damaged(self, shard: int, member: str, why: str) -> ValueError:
        path = self.folder / self._entry(shard).name
        return ValueError(f"{path}: member {member} is damaged: {why}; restore the file or capture again.")
