"""The disk format of a shard set: names, the record of a sample, `metadata.json`. docs/disk-format.md describes it.

Legend: D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from fluxsae.spec import CaptureSpec, GenerationSpec
from fluxsae.storage import read_json

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
    def from_dict(cls, values: dict[str, Any]) -> SampleRecord:
        """ValueError unless `values` has exactly the fields of a record, with their types."""
        if set(values) != set(cls._fields):
            raise ValueError(f"fields {sorted(values)}, expected {sorted(cls._fields)}")
        for name in cls._fields[:4]:
            if type(values[name]) is not int:
                raise ValueError(f"{name} is {values[name]!r}, expected an integer")
        return cls(**{**values, "prompt": str(values["prompt"])})


class Sums(NamedTuple):
    """Statistics of some tokens in a form that merges: count, mean, sum of squared distances to it, sum of norms."""

    n_tokens: int
    mean: Float64[Tensor, "D"]
    squares: float
    norms: float

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "mean": self.mean.tolist()}


class Statistics(NamedTuple):
    """Statistics of all tokens of a set, as they are stored.

    `scale` is sqrt(D / E‖x - mean‖²): (x - mean) · scale has unit variance, averaged over channels.
    `mean_norm` is E‖x‖ of raw tokens, the unit of steering strength.
    """

    n_tokens: int
    mean: Float64[Tensor, "D"]
    scale: float
    mean_norm: float

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "mean": self.mean.tolist()}


def merge(sums: Sequence[Sums]) -> Sums:
    """Sums over all parts, merged in the order given (Chan et al. 1979): one order gives one result to the bit."""
    total = sums[0]
    for part in sums[1:]:
        n = total.n_tokens + part.n_tokens
        delta = part.mean - total.mean
        between = float((delta.numpy() ** 2).sum()) * total.n_tokens * part.n_tokens / n
        total = Sums(
            n_tokens=n,
            mean=total.mean + delta * (part.n_tokens / n),
            squares=total.squares + part.squares + between,
            norms=total.norms + part.norms,
        )
    return total


def statistics(sums: Sums) -> Statistics:
    variance = sums.squares / sums.n_tokens
    scale = math.sqrt(sums.mean.numel() / variance) if variance > 0 else 1.0
    return Statistics(sums.n_tokens, sums.mean, scale, sums.norms / sums.n_tokens)


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a set: images `first_image` to `first_image + samples - 1`, in order."""

    name: str
    samples: int
    first_image: int
    bytes: int
    sha256: str


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
        return {
            "version": self.version,
            "kind": self.kind,
            "storage": self.storage,
            "n_images": self.n_images,
            "spec": self.spec.to_dict(),
            "shards": [asdict(shard) for shard in self.shards],
            "statistics": numbers.to_dict() if numbers is not None else None,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ShardMetadata:
        kind = values["kind"]
        numbers = values["statistics"]
        mean = None if numbers is None else torch.tensor(numbers["mean"], dtype=torch.float64)
        return cls(
            kind=kind,
            storage=values["storage"],
            spec=parse_spec(kind, values["spec"]),
            shards=tuple(ShardEntry(**shard) for shard in values["shards"]),
            statistics=None if numbers is None else Statistics(**{**numbers, "mean": mean}),
            version=values["version"],
        )


def parse_spec(kind: str, values: dict[str, Any]) -> CaptureSpec | GenerationSpec:
    return CaptureSpec.from_dict(values) if kind == "tokens" else GenerationSpec.from_dict(values)


def read_metadata(folder: Path) -> ShardMetadata:
    """The metadata of a set. FileNotFoundError when the folder is no whole set, ValueError when the file is damaged."""
    path = folder / METADATA
    if not path.exists():
        what = f"{folder} has no {METADATA}" if folder.exists() else f"there is no folder {folder}"
        raise FileNotFoundError(f"{what}; name a folder that a finished capture left, or run the capture to its end.")
    values = read_json(path)
    if not isinstance(values, dict) or values.get("version") != VERSION:
        found = values.get("version") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path} has format version {found!r}, this package reads {VERSION}; capture again.")
    try:
        return ShardMetadata.from_dict(values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a shard set's metadata ({error}); restore it or capture again.") from error
