"""What was captured and from where: sites, token grids and the specs that every artefact carries.

A spec is written once, at capture, travels with shards, SAE and scores, and is compared at every hand-over.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

from fluxsae.files import hash_json

Stream = Literal["image", "text"]
PATCH = 16
"""Pixels on the side of one image token: an f8 autoencoder times FLUX's 2×2 latent patches."""


@dataclass(frozen=True)
class Site:
    """A module path inside the transformer, and which stream of tokens to read from its output.

    A site is written as `transformer_blocks.15.ff`, or with its stream as `transformer_blocks.15:text`. Without a
    stream, modules of the text branch (`ff_context`, `norm1_context`, `attn.to_add_out`, …) mean text tokens. All other
    modules mean image tokens.
    """

    path: str
    stream: Stream

    @property
    def default_stream(self) -> Stream:
        return (
            "text" if re.search(r"_context\b|\.(to_add_out|add_[qkv]_proj|norm_added_[qk])\b", self.path) else "image"
        )

    def __str__(self) -> str:
        return self.path if self.stream == self.default_stream else f"{self.path}:{self.stream}"


def parse_site(text: str) -> Site:
    """`"transformer_blocks.15.ff"` or `"transformer_blocks.15:text"` as a `Site`; ValueError for anything else."""
    match = re.fullmatch(r"([A-Za-z_]\w*(?:\.\w+)*)(?::(image|text))?", text)
    if match is None:
        raise ValueError(
            f"site {text!r} is not a module path with an optional stream; "
            "write for example 'transformer_blocks.15.ff' or 'transformer_blocks.15:text'."
        )
    path, stream = match[1], match[2]
    if stream is None:
        return Site(path, Site(path, "image").default_stream)
    return Site(path, "text" if stream == "text" else "image")


class Grid(NamedTuple):
    """Rows and columns of image tokens, row by row."""

    rows: int
    columns: int

    @property
    def n_tokens(self) -> int:
        return self.rows * self.columns


def token_grid(height: int, width: int) -> Grid:
    """The token grid of an image of height × width pixels; ValueError unless both are positive multiples of 16."""
    for name, size in (("height", height), ("width", width)):
        if size <= 0 or size % PATCH:
            near = max(PATCH, round(size / PATCH) * PATCH)
            raise ValueError(f"{name} {size} is not a positive multiple of {PATCH} pixels; use {near}, for example.")
    return Grid(height // PATCH, width // PATCH)


@dataclass(frozen=True)
class GenerationSpec:
    """How a set of images was generated: everything that an image depends on, besides its prompt and seed.

    `shift` is the scheduler's time shift for this image size: exp(mu) with dynamic shifting. `dtype` is the dtype in
    which the transformer computes. `prompts_hash` is a hash of all prompts. `base_seed` decides the seeds of images.
    """

    model: str
    model_hash: str
    height: int
    width: int
    n_steps: int
    guidance: float
    shift: float
    text_length: int
    dtype: str
    prompts_hash: str
    repetitions: int
    base_seed: int

    def __post_init__(self) -> None:
        token_grid(self.height, self.width)

    @property
    def grid(self) -> Grid:
        return token_grid(self.height, self.width)

    @property
    def hash(self) -> str:
        return hash_json(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GenerationSpec:
        return cls(**_known(cls, values))


@dataclass(frozen=True)
class CaptureSpec:
    """What one shard set of tokens holds: a site and a denoising step, from 0, of a generation."""

    generation: GenerationSpec
    site: str
    step: int

    def __post_init__(self) -> None:
        parse_site(self.site)
        check_step(self.step, self.generation.n_steps)

    @property
    def n_tokens(self) -> int:
        """Tokens an image at this site."""
        image = parse_site(self.site).stream == "image"
        return self.generation.grid.n_tokens if image else self.generation.text_length

    @property
    def hash(self) -> str:
        return hash_json(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return {"generation": self.generation.to_dict(), "site": self.site, "step": self.step}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CaptureSpec:
        known = _known(cls, values)
        return cls(GenerationSpec.from_dict(known["generation"]), known["site"], known["step"])


def check_step(step: int, n_steps: int) -> None:
    """ValueError unless `step` is a 0-based index into a schedule of `n_steps` steps."""
    if not 0 <= step < n_steps:
        raise ValueError(
            f"step {step} is beyond the schedule: steps count from 0, so {n_steps} steps are 0 to {n_steps - 1}."
        )


WHICH_IMAGES = ("prompts_hash", "repetitions", "base_seed")
"""The fields of a spec that say which images were generated, not how."""


def differences(
    ours: CaptureSpec | GenerationSpec, theirs: CaptureSpec | GenerationSpec, ignore: Collection[str] = ()
) -> list[str]:
    """Every field in which two specs differ, as `name: ours != theirs`, but those to `ignore`; empty when they agree.

    `model`, a folder or hub name, is left out: `model_hash` says whether the weights are the same.
    """
    a, b = _flat(ours.to_dict()), _flat(theirs.to_dict())
    other = (key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key) and key not in ignore)
    return [f"{key}: {a.get(key)!r} != {b.get(key)!r}" for key in other]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    inner = values.get("generation", {})
    return {k: v for k, v in {**values, **inner}.items() if k not in ("generation", "model")}


def _known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(cls)}
    if set(values) != names:
        raise ValueError(
            f"a {cls.__name__} record has the fields {sorted(values)}, expected {sorted(names)}; "
            "the file is from another version or damaged: capture again."
        )
    return values
