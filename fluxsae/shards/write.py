"""Writes a shard set. A shard is one tar, which is whole or absent. The same samples always give the same bytes.

Legend: T tokens an image, D width.
"""

from __future__ import annotations

import io
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fluxsae.files import read_json, remove_parts, sealed, unsealed, write_json
from fluxsae.records import CaptureSpec, GenerationSpec, Sums, differences, merge_sums, statistics_of
from fluxsae.shards.encoding import decode_tokens, encode_tokens
from fluxsae.shards.format import (
    IMAGE,
    METADATA,
    TOKENS,
    Kind,
    SampleRecord,
    ShardEntry,
    ShardMetadata,
    Storage,
    parse_entry,
    parse_spec,
    read_metadata,
    shard_name,
    sums_name,
)
from fluxsae.shards.open_shard import Kept, OpenShard, kept, payloads

_logger = logging.getLogger(__name__)

_AT_ONCE = 2**20
"""Numbers that are summed by one call, 8 bytes each: an image of FLUX.1 at 256×256. Calls are what counts, as whoever
makes images meanwhile waits for the interpreter after each."""


class ShardWriter:
    """Writes the shards of one set; several processes may each write other shards of the same folder.

    Args:
        folder: the set's folder, made when absent. ValueError when it holds a finished set of another spec.
        spec: a `CaptureSpec` for tokens, a `GenerationSpec` for images.
        kind: "tokens" or "images".
        storage: how tokens are stored; images are always PNG.
        images_per_shard: every shard but the last holds this many.
        skip_not_finite: store zeros for an image whose tokens are not finite, and list it as skipped.
    """

    def __init__(
        self,
        folder: str | Path,
        spec: CaptureSpec | GenerationSpec,
        kind: Kind = "tokens",
        storage: Storage = "bf16",
        images_per_shard: int = 64,
        skip_not_finite: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.spec = spec
        self.kind: Kind = kind
        self.storage: Storage = storage
        self.images_per_shard = images_per_shard
        self.skip_not_finite = skip_not_finite
        self.n_bytes = 0
        """Bytes of tokens or pictures that this object has written."""
        self._open: dict[int, OpenShard] = {}
        self._sums: dict[int, Sums] = {}
        self._kept: dict[int, Kept | None] = {}
        if (self.folder / METADATA).exists():
            _refuse_another(read_metadata(self.folder), spec, self._storage_name, self.folder)

    @property
    def _storage_name(self) -> str:
        return self.storage if self.kind == "tokens" else IMAGE

    @property
    def _extension(self) -> str:
        return TOKENS if self.kind == "tokens" else IMAGE

    @property
    def _of(self) -> dict[str, Any]:
        """What all shards of this set have in common."""
        return {
            "storage": self._storage_name,
            "images_per_shard": self.images_per_shard,
            "spec": self.spec.to_dict(),
        }

    def is_complete(self, shard: int, samples: int | None = None) -> bool:
        """Whether this shard is on disk, whole, and of this spec (with `samples` images, where that is given).

        One whose record beside it is damaged is not: it is made again.
        """
        path = self.folder / sums_name(shard)
        tar = self.folder / shard_name(shard)
        if not (path.is_file() and tar.is_file()):
            return False
        entry, _ = self._read_sums(shard)
        return entry is not None and entry.bytes == tar.stat().st_size and samples in (None, entry.samples)

    def add(self, shard: int, record: SampleRecord, payload: Float[Tensor, "T D"] | Image.Image) -> None:
        """Append one image's tokens or picture, behind what `kept` says is there.

        ValueError for images out of order, or tokens that are not finite, unless those are skipped.
        """
        data = encode_tokens(payload, self.storage) if isinstance(payload, Tensor) else _encode_image(payload)
        part = _sums(_decoded(data)) if self.kind == "tokens" else None
        skipped = part is not None and not math.isfinite(part.norms)
        if isinstance(payload, Tensor) and skipped:
            where = f" at {self.spec.site}, step {self.spec.step}," if isinstance(self.spec, CaptureSpec) else ""
            what = f"the tokens of image {record.image} (prompt {record.prompt!r}){where} hold NaN or infinite values"
            if not self.skip_not_finite:
                raise ValueError(
                    f"{what}; use a dtype with a wider range, such as bfloat16 or float32, or skip what is not finite."
                )
            _logger.warning("%s: skipped", what)
            data = encode_tokens(torch.zeros_like(payload), self.storage)
        if shard not in self._open:
            self._begin(shard)
        self._open[shard].add(record, self._extension, data, skipped)
        if part is not None and not skipped:
            self._count(shard, part)
        self.n_bytes += len(data)

    def kept(self, shard: int) -> int:
        """How many images of a shard an earlier process kept. Who asks goes on behind them."""
        if shard not in self._kept:
            self._kept[shard] = kept(self.folder / shard_name(shard), self._of)
        found = self._kept[shard]
        return len(found.images) if found is not None else 0

    def keep(self, shard: int) -> None:
        """Bring what an open shard has so far to the disk, for a later process to go on from."""
        self._open[shard].keep()

    def close_shard(self, shard: int) -> None:
        """Put the shard under its name, and beside it what `finalise` needs. ValueError when nothing was added."""
        if shard not in self._open:
            raise ValueError(f"shard {shard} of {self.folder} has no samples to close; add its images first.")
        images, skipped, n_bytes, sha256 = self._open.pop(shard).close()
        entry = ShardEntry(shard_name(shard), len(images), images[0], n_bytes, sha256, tuple(skipped))
        sums = self._sums.pop(shard, None)
        values = {**self._of, "shard": entry.to_dict(), "sums": sums.to_dict() if sums is not None else None}
        write_json(self.folder / sums_name(shard), sealed(values))

    def abandon(self) -> None:
        """Write no more. Of shards that are not closed, what was kept stays."""
        while self._open:
            self._open.popitem()[1].put_down()
        self._kept.clear()

    def finalise(self, n_shards: int) -> ShardMetadata:
        """Write `metadata.json` once all shards are whole; for one process, after the others are done.

        Statistics are merged in shard order, so they do not depend on who wrote what.
        Raises ValueError naming the first shard that is missing or of another spec.
        """
        entries: list[ShardEntry] = []
        sums: list[Sums] = []
        for shard in range(n_shards):
            if not self.is_complete(shard):
                raise ValueError(f"{self.folder / shard_name(shard)} is not whole; run the capture again to finish it.")
            entry, part = self._read_sums(shard)
            assert entry is not None
            expected = entries[-1].first_image + entries[-1].samples if entries else 0
            if entry.first_image != expected:
                raise ValueError(
                    f"{self.folder / entry.name} starts at image {entry.first_image}, expected {expected}; "
                    "remove the folder and capture again."
                )
            entries.append(entry)
            sums += [part] if part is not None else []
        if self.kind == "tokens" and not sums:
            raise ValueError(
                f"the tokens of all images of {self.folder} hold NaN or infinite values, so all were skipped; remove "
                "the folder, and capture with another dtype, such as bfloat16 or float32."
            )
        numbers = statistics_of(merge_sums(sums)) if sums else None
        metadata = ShardMetadata(self.kind, self._storage_name, self.spec, tuple(entries), numbers)
        for left_over in (*self.folder.glob(".shard-*"), *self.folder.glob("..shard-*")):
            left_over.unlink()
        remove_parts(self.folder / METADATA)
        write_json(self.folder / METADATA, metadata.to_dict())
        return metadata

    def _begin(self, shard: int) -> None:
        """Open a shard, behind what is kept where somebody has asked for that."""
        path, there = self.folder / shard_name(shard), self._kept.get(shard)
        self._open[shard] = OpenShard(path, self._of, there)
        self._sums.pop(shard, None)
        if there is not None and self.kind == "tokens":
            for image, data in zip(there.images, payloads(path, there, TOKENS), strict=True):
                if image not in there.skipped:
                    self._count(shard, _sums(_decoded(data)))

    def _count(self, shard: int, part: Sums) -> None:
        self._sums[shard] = merge_sums([self._sums[shard], part]) if shard in self._sums else part

    def _read_sums(self, shard: int) -> tuple[ShardEntry | None, Sums | None]:
        try:
            values = unsealed(read_json(self.folder / sums_name(shard)))
            same = (values["storage"], values["images_per_shard"]) == (self._storage_name, self.images_per_shard)
            if not same or differences(self.spec, parse_spec(self.kind, values["spec"])):
                return None, None
            entry, numbers = parse_entry(values["shard"], shard), values["sums"]
            mean = None if numbers is None else torch.tensor(numbers["mean"], dtype=torch.float64)
            return entry, None if numbers is None else Sums(**{**numbers, "mean": mean})
        except (KeyError, TypeError, ValueError, AttributeError):
            return None, None


def _decoded(data: bytes | bytearray) -> Float[Tensor, "T D"]:
    return decode_tokens(bytearray(data), 0, len(data))


def _sums(tokens: Float[Tensor, "T D"]) -> Sums:
    """So many tokens at a time as memory for float64 is bounded; in numpy, as its sums depend on no threads.

    Where a token is not finite, the sum of norms is not.
    """
    n = max(1, min(len(tokens), _AT_ONCE // tokens.shape[1]))
    memory = np.empty((n, tokens.shape[1]))
    parts = []
    with np.errstate(invalid="ignore"):
        for some in tokens.split(n):
            x = memory[: len(some)]
            torch.from_numpy(x).copy_(some)
            norms = np.sqrt(np.einsum("td,td->t", x, x)).sum()
            mean = x.mean(axis=0)
            x -= mean
            parts.append(Sums(len(x), torch.from_numpy(mean), float(np.einsum("td,td->", x, x)), float(norms)))
        return merge_sums(parts)


def _encode_image(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _refuse_another(found: ShardMetadata, spec: CaptureSpec | GenerationSpec, storage: str, folder: Path) -> None:
    if type(found.spec) is not type(spec):
        raise ValueError(f"{folder} holds a set of {found.kind}; name another folder.")
    other = differences(found.spec, spec)
    if found.storage != storage:
        other.append(f"storage: {found.storage!r} != {storage!r}")
    if other:
        raise ValueError(
            f"{folder} holds another capture ({'; '.join(other)}); name another folder or remove this one."
        )
