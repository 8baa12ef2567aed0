"""The disk format of a shard set: names, the record of a sample, `metadata.json`. docs/disk-format.md describes it.

Legend: D width.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from fluxsae.files import read_json, sealed, unsealed
from fluxsae.records import CaptureSpec, GenerationSpec, Statistics

VERSION = 1
METADATA = "metadata.json"
TOKENS = "tokens.safetensors"
IMAGE = "png"
RECORD = "json"

Kind = Literal["tokens", "images"]
Storage = Literal["bf16", "fp32", "fp8"]


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.tar"


def sums_name(shard: int) -> str:
    """The file beside a shard that says that it is whole and holds its share of the statistics."""
    return f"shard-{shard:05d}.json"


def sample_key(image: int) -> str:
    return f"{image:09d}"


class SampleRecord(NamedTuple):
    """What one image of a set is: its index in the capture, its prompt and its seed."""

    image: int
    prompt_id: int
    repetition: int
    seed: int
    prompt: str

    @classmethod
    def from_dict(cls, values: Any) -> SampleRecord:
        """ValueError unless `values` has exactly the fields of a record, with their types."""
        if not isinstance(values, dict) or set(values) != set(cls._fields):
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"fields {found}, expected {sorted(cls._fields)}")
        for name in cls._fields[:4]:
            if type(values[name]) is not int:
                raise ValueError(f"{name} is {values[name]!r}, expected an integer")
        if not isinstance(values["prompt"], str):
            raise ValueError(f"prompt is {values['prompt']!r}, expected text")
        return cls(**values)


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a set: images `first_image` to `first_image + samples - 1`, in order.

    Of the `skipped` ones the tokens were not finite; zeros are in their place.
    """

    name: str
    samples: int
    first_image: int
    bytes: int
    sha256: str
    skipped: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return values if self.skipped else {name: value for name, value in values.items() if name != "skipped"}


@dataclass(frozen=True)
class ShardMetadata:
    """`metadata.json`: written last, so a set that has it is whole."""

    kind: Kind
    storage: str
    spec: CaptureSpec | GenerationSpec
    shards: tuple[ShardEntry, ...]
    statistics: Statistics | None
    version: int = VERSION

    @property
    def n_images(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def to_dict(self) -> dict[str, Any]:
        numbers = self.statistics
        return sealed(
            {
                "version": self.version,
                "kind": self.kind,
                "storage": self.storage,
                "n_images": self.n_images,
                "spec": self.spec.to_dict(),
                "shards": [shard.to_dict() for shard in self.shards],
                "statistics": numbers.to_dict() if numbers is not None else None,
            }
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ShardMetadata:
        """ValueError, KeyError or TypeError unless `values` is what `to_dict` gave."""
        values = unsealed(values)
        kind, n_images = values["kind"], values["n_images"]
        if kind not in get_args(Kind):
            raise ValueError(f"kind is {kind!r}, expected one of {', '.join(get_args(Kind))}")
        if (values["statistics"] is None) != (kind == "images"):
            raise ValueError(f"statistics are {type(values['statistics']).__name__} in a set of {kind}")
        metadata = cls(
            kind=kind,
            storage=values["storage"],
            spec=parse_spec(kind, values["spec"]),
            shards=tuple(parse_entry(entry, shard) for shard, entry in enumerate(values["shards"])),
            statistics=None if kind == "images" else _parse_statistics(values["statistics"]),
            version=values["version"],
        )
        first = 0
        for entry in metadata.shards:
            if entry.first_image != first:
                raise ValueError(f"{entry.name} starts at image {entry.first_image}, expected {first}")
            first += entry.samples
        if n_images != first:
            raise ValueError(f"n_images is {n_images!r} but its shards hold {first}")
        return metadata


def parse_entry(values: Any, shard: int) -> ShardEntry:
    """One shard's entry. ValueError or TypeError unless its name is that shard's own and its numbers are counts."""
    entry = ShardEntry(**{**values, "skipped": tuple(values.get("skipped", ()))})
    if entry.name != shard_name(shard):
        raise ValueError(f"shard {shard} is called {entry.name!r}, expected {shard_name(shard)!r}")
    for name, least in (("samples", 1), ("first_image", 0), ("bytes", 1)):
        if type(values[name]) is not int or values[name] < least:
            raise ValueError(f"{name} of {entry.name} is {values[name]!r}, expected an integer of at least {least}")
    if not isinstance(entry.sha256, str):
        raise ValueError(f"sha256 of {entry.name} is {entry.sha256!r}, expected text")
    images = range(entry.first_image, entry.first_image + entry.samples)
    if any(type(image) is not int or image not in images for image in entry.skipped):
        raise ValueError(f"skipped of {entry.name} is {list(entry.skipped)!r}, expected some of its images")
    return entry


def _parse_statistics(values: Any) -> Statistics:
    numbers = Statistics(**{**values, "mean": torch.tensor(values["mean"], dtype=torch.float64)})
    if numbers.mean.ndim != 1 or not bool(torch.isfinite(numbers.mean).all()):
        raise ValueError("mean in its statistics is not a list of finite numbers")
    if type(numbers.n_tokens) is not int or not (math.isfinite(numbers.scale) and math.isfinite(numbers.mean_norm)):
        raise ValueError("n_tokens, scale and mean_norm in its statistics are not finite numbers")
    return numbers


def parse_spec(kind: str, values: Any) -> CaptureSpec | GenerationSpec:
    return CaptureSpec.from_dict(values) if kind == "tokens" else GenerationSpec.from_dict(values)


def read_metadata(folder: Path) -> ShardMetadata:
    """The metadata of a set. FileNotFoundError when the folder is no whole set, ValueError when the file is damaged."""
    path = folder / METADATA
    if not path.is_file():
        what = f"{folder} has no {METADATA}" if folder.exists() else f"there is no folder {folder}"
        raise FileNotFoundError(f"{what}; name a folder that a finished capture left, or run the capture to its end.")
    values = read_json(path)
    if not isinstance(values, dict) or values.get("version") != VERSION:
        found = values.get("version") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path} has format version {found!r}, this package reads {VERSION}; capture again.")
    try:
        return ShardMetadata.from_dict(values)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} is not a shard set's metadata ({error}); restore it or capture again.") from error
