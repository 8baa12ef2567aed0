"""Reads a shard set with random access: tars are memory-mapped, members found by hopping from header to header.

Legend: B images, T tokens an image, D width.
"""

from __future__ import annotations

import io
import json
import mmap
import re
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fluxsae.shards.encoding import decode_tokens
from fluxsae.shards.format import (
    IMAGE,
    RECORD,
    TOKENS,
    Kind,
    SampleRecord,
    ShardEntry,
    ShardMetadata,
    Statistics,
    read_metadata,
    sample_key,
)
from fluxsae.spec import CaptureSpec, GenerationSpec

_BLOCK = 512
_MAPS = 128
"""Shards mapped at once: each map holds a file descriptor, and a process has about a thousand."""


class Member(NamedTuple):
    """Where a member's bytes lie in its tar."""

    name: str
    start: int
    size: int


class ShardSet:
    """A finished shard set. Images are counted from 0 in the order of the capture, through all shards.

    Safe to hand to worker processes: maps and indices are made where they are used.
    """

    def __init__(self, folder: Path, metadata: ShardMetadata) -> None:
        self.folder = folder
        self.metadata = metadata
        self._first = [shard.first_image for shard in metadata.shards]
        self._maps: dict[int, mmap.mmap] = {}
        self._indices: dict[int, dict[str, Member]] = {}

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
        return self.metadata.n_images

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

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
        shape = (self.spec.n_tokens, self.statistics.mean.numel())
        if tokens.shape != shape:
            raise self._damaged(shard, member.name, f"its tokens have shape {list(tokens.shape)}, expected {shape}")
        return tokens

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
        if shard not in self._indices:
            self._indices[shard] = index_tar(self._map(shard), self.folder / self._entry(shard).name)
        name = f"{sample_key(image)}.{extension}"
        if name not in self._indices[shard]:
            raise self._damaged(shard, name, "it is missing")
        return shard, self._indices[shard][name]

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            if len(self._maps) >= _MAPS:
                del self._maps[next(iter(self._maps))]  # tensors that share its memory keep the map itself alive
            self._maps[shard] = self._open_map(self._entry(shard))
        return self._maps[shard]

    def _open_map(self, entry: ShardEntry) -> mmap.mmap:
        path = self.folder / entry.name
        tar = map_tar(path)
        if len(tar) != entry.bytes:
            where = _last_member(tar, path)
            raise ValueError(
                f"{path} has {len(tar)} bytes, expected {entry.bytes} ({where}); restore it or capture again."
            )
        return tar

    def _entry(self, shard: int) -> ShardEntry:
        return self.metadata.shards[shard]

    def _damaged(self, shard: int, member: str, why: str) -> ValueError:
        path = self.folder / self._entry(shard).name
        return ValueError(f"{path}: member {member} is damaged: {why}; restore the file or capture again.")


def map_tar(path: Path) -> mmap.mmap:
    """A tar mapped into memory, copy-on-write: torch takes only writable buffers, and nothing here reaches the file.

    FileNotFoundError when it is missing, ValueError when it is empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; restore it or capture again.")
    with path.open("rb") as file:
        if file.seek(0, io.SEEK_END) == 0:
            raise ValueError(f"{path} is empty; restore it or capture again.")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def index_tar(tar: mmap.mmap, path: Path) -> dict[str, Member]:
    """The members of a plain (ustar) tar by name. ValueError naming file and member where damaged or cut short."""
    members: dict[str, Member] = {}
    offset, last = 0, "the start"
    while tar[offset : offset + _BLOCK].strip(b"\0"):
        header = tar[offset : offset + _BLOCK]
        if len(header) < _BLOCK or not _checks(header):
            raise ValueError(f"{path} is damaged after {last}, at byte {offset}; restore it or capture again.")
        name = b"/".join(part.rstrip(b"\0") for part in (header[345:500], header[:100]) if part.strip(b"\0"))
        size = header[124:136].rstrip(b" \0")
        last = f"member {name.decode(errors='replace')}"
        if header[156:157] not in (b"0", b"\0") or not re.fullmatch(rb"[0-7]+", size):
            raise ValueError(f"{path}: {last} is no plain file of a plain size; restore the file or capture again.")
        member = Member(name.decode(errors="replace"), offset + _BLOCK, int(size, 8))
        if member.start + member.size > len(tar):
            raise ValueError(f"{path} is cut short in {last}; restore it or capture again.")
        if member.name in members:
            raise ValueError(f"{path} has {last} twice; restore it or capture again.")
        members[member.name] = member
        offset = member.start + -(-member.size // _BLOCK) * _BLOCK
    return members


def _checks(header: bytes) -> bool:
    try:
        expected = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    return sum(header[:148]) + sum(header[156:]) + 8 * ord(" ") == expected


def _last_member(tar: mmap.mmap, path: Path) -> str:
    try:
        members = index_tar(tar, path)
    except ValueError as error:
        return str(error).partition(";")[0].removeprefix(f"{path} ")
    return f"its last member is {list(members)[-1]}" if members else "it has no member"
