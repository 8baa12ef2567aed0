"""A shard that is being written: a tar under a hidden name, which can be put down after any batch and taken up again.

Beside it lies a record of how many bytes were whole when it was last kept, and of their hash: a process that dies, or a
power cut, costs what came after.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from webdataset import TarWriter

from fluxsae.files import hash_json, naming, put_in_place, read_json, sealed, unsealed, write_json
from fluxsae.shards.format import RECORD, SampleRecord, sample_key
from fluxsae.shards.tar import index_tar, map_tar


class Kept(NamedTuple):
    """The whole part of an open shard: its bytes, the images in them with the skipped ones, and the hash so far."""

    n_bytes: int
    images: list[int]
    skipped: list[int]
    hash: hashlib._Hash


class Done(NamedTuple):
    """A shard that is under its name."""

    images: list[int]
    skipped: list[int]
    n_bytes: int
    sha256: str


class OpenShard:
    """Takes the images of the shard at `path` in order.

    Args:
        path: the shard's name to be.
        of: what the shard is part of; one that was kept for something else is not gone on with.
        kept: from `kept`, what to go on behind; otherwise the shard is begun anew.
    """

    def __init__(self, path: Path, of: Mapping[str, Any], kept: Kept | None = None) -> None:
        self.path = path
        self.of = hash_json(of)
        self.images = list(kept.images) if kept is not None else []
        self.skipped = list(kept.skipped) if kept is not None else []
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if kept is None:
                _record_of(path).unlink(missing_ok=True)  # before the bytes that it tells of go
            self._file = _Hashed(_part_of(path), kept)
            self._tar = _Appending(self._file)

    def add(self, record: SampleRecord, extension: str, data: bytes, skipped: bool = False) -> None:
        """`skipped`: the data are zeros in the place of others. ValueError when an image does not follow the last."""
        if self.images and record.image != self.images[-1] + 1:
            raise ValueError(
                f"image {record.image} does not follow image {self.images[-1]} in {self.path}; add images in order."
            )
        text = json.dumps(record._asdict(), ensure_ascii=False).encode()
        with naming(self.path):
            self._tar.write({"__key__": sample_key(record.image), RECORD: text, extension: data})
        self.images.append(record.image)
        if skipped:
            self.skipped.append(record.image)

    def keep(self) -> None:
        """Bring everything so far to the disk: a later process can go on from here."""
        with naming(self.path):
            self._file.sync()
        of = {"of": self.of, "images": self.images, "skipped": self.skipped}
        write_json(_record_of(self.path), sealed({**of, "bytes": self._file.tell(), "sha256": self._file.sha256()}))

    def close(self) -> Done:
        """Put the shard under its name."""
        with naming(self.path):
            self._tar.close()
            self._file.sync()
            done = Done(self.images, self.skipped, self._file.tell(), self._file.sha256())
            self._file.close()
            put_in_place(_part_of(self.path), self.path)
            _record_of(self.path).unlink(missing_ok=True)
        return done

    def put_down(self) -> None:
        """Write no more. What was kept stays for whoever goes on."""
        self._file.close()
        if not _record_of(self.path).exists():
            _part_of(self.path).unlink(missing_ok=True)


def kept(path: Path, of: Mapping[str, Any]) -> Kept | None:
    """What an earlier process kept of the shard at `path`, None where that is nothing, damaged or of something else."""
    try:
        values = unsealed(read_json(_record_of(path)))
        if values["of"] != hash_json(of):
            return None
        n_bytes, images = int(values["bytes"]), [int(image) for image in values["images"]]
        skipped = [int(image) for image in values["skipped"]]
        found = _hash_of(_part_of(path), n_bytes)
        whole = found.hexdigest() == values["sha256"]
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return Kept(n_bytes, images, skipped, found) if whole else None


def payloads(path: Path, of_images: Kept, extension: str) -> list[bytearray]:
    """What was kept of the shard at `path`, image by image."""
    part = _part_of(path)
    tar = map_tar(part)
    members = index_tar(tar, part)
    found = (members[f"{sample_key(image)}.{extension}"] for image in of_images.images)
    return [bytearray(tar[member.start : member.start + member.size]) for member in found]


_AT_ONCE = 2**25
"""Bytes of a member that are written by one call."""


class _Appending(TarWriter):
    """Writes behind what a file holds, and holds nothing back, as its own stream would."""

    def __init__(self, file: _Hashed) -> None:
        super().__init__(file, user="fluxsae", group="fluxsae", mode=0o644, mtime=0, encoder=False)
        # In pieces of 16 KiB, as by default, whoever makes images meanwhile would wait for the interpreter after each.
        self.tarstream = tarfile.open(fileobj=file, mode="w", copybufsize=_AT_ONCE)  # type: ignore[call-overload]  # noqa: SIM115


class _Hashed:
    """A file that hashes what is written to it, behind what is kept."""

    def __init__(self, path: Path, kept: Kept | None) -> None:
        self._hash = kept.hash.copy() if kept is not None else hashlib.sha256()
        self._file: BinaryIO = path.open("wb" if kept is None else "rb+")
        if kept is not None:
            self._file.truncate(kept.n_bytes)
            self._file.seek(kept.n_bytes)

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()


def _hash_of(path: Path, n_bytes: int) -> hashlib._Hash:
    """Of the first so many bytes, or of all where there are fewer."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(min(n_bytes - file.tell(), 1 << 20)):
            digest.update(block)
    return digest


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.stem}-open{path.suffix}")


def _record_of(path: Path) -> Path:
    return path.with_name(f".{path.stem}-open.json")
