"""What a capture's folder holds: the record of the generation, its shard sets, and room for what is to come."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fluxsae.capture.prompt_data import PromptData, RequestBatch
from fluxsae.files import read_json, remove_parts, write_json, write_text
from fluxsae.records import CaptureSpec, GenerationSpec, Prompt, Site, differences
from fluxsae.shards import ShardWriter, Storage

GENERATION = "generation.json"
TOKEN_BYTES = {"bf16": 2, "fp32": 4, "fp8": 1}
PNG_BYTES = 2
"""Bytes a pixel of a photograph-like PNG, roughly; noise would take 3."""
MEMBER_BYTES = 4096
"""What a tar adds to an image: two headers, the record, padding."""


class CaptureSet(NamedTuple):
    """One shard set that a capture fills: tokens of a site at a step, or the images when `site` is None.

    `missing` are the shards that it lacked when the capture was started.
    """

    writer: ShardWriter
    missing: frozenset[int]
    site: str | None = None
    step: int = 0

    def lacks(self, batch: RequestBatch) -> bool:
        return batch.shard in self.missing and batch.requests[-1].image >= self.end_of_kept(batch.shard)

    def end_of_kept(self, shard: int) -> int:
        """The first image of a shard that an earlier process did not keep."""
        return shard * self.writer.images_per_shard + self.writer.kept(shard)


def set_folder(folder: Path, site: str | Site, step: int) -> Path:
    """Where a capture's folder holds the tokens of a site at a step, with "@" for ":", which not all systems allow."""
    return folder / str(site).replace(":", "@") / f"step-{step:02d}"


def open_sets(
    folder: Path,
    spec: GenerationSpec,
    keys: Iterable[tuple[Site, int]],
    storage: Storage,
    data: PromptData,
    images: bool,
    skip_not_finite: bool,
) -> list[CaptureSet]:
    """The sets of `keys`, sites and steps, and that of the images. ValueError when one holds another capture."""
    sets = []
    for site, step in keys:
        captured, where = CaptureSpec(spec, str(site), step), set_folder(folder, site, step)
        writer = ShardWriter(where, captured, "tokens", storage, data.images_per_shard, skip_not_finite)
        sets.append(CaptureSet(writer, _missing(writer, data), str(site), step))
    if images:
        writer = ShardWriter(folder / "images", spec, "images", storage, data.images_per_shard)
        sets.append(CaptureSet(writer, _missing(writer, data)))
    return sets


def check_or_record_generation(folder: Path, spec: GenerationSpec, data: PromptData, write: bool) -> None:
    """Write what this capture is. ValueError when the folder holds another, naming each field and both values."""
    path = folder / GENERATION
    if path.exists():
        _refuse_another(path, spec, data.images_per_shard)
    if not write:
        return
    values = {
        "spec": spec.to_dict(),
        "prompts": str(data.path),
        "n_prompts": len(data.prompts),
        "n_images": data.n_images,
        "images_per_shard": data.images_per_shard,
    }
    # Always: attributes may have been corrected since, which changes no image.
    remove_parts(folder / "prompts.jsonl")
    remove_parts(path)
    lines = [json.dumps(_prompt_line(prompt), ensure_ascii=False) + "\n" for prompt in data.prompts]
    write_text(folder / "prompts.jsonl", "".join(lines))
    write_json(path, values)


def image_bytes(spec: GenerationSpec) -> int:
    """About how many bytes a picture takes on disk."""
    return spec.height * spec.width * PNG_BYTES + MEMBER_BYTES


def token_bytes(n_tokens: int, width: int, storage: Storage) -> int:
    """About how many bytes an image's tokens at one site and step take on disk."""
    scales = 4 * n_tokens if storage == "fp8" else 0
    return n_tokens * width * TOKEN_BYTES[storage] + scales + MEMBER_BYTES


def check_space(folder: Path, sizes: Sequence[int]) -> None:
    """ValueError when the disk that holds `folder` has less room than the `sizes`, in bytes, add up to."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    needed, free = sum(sizes), shutil.disk_usage(there).free
    if needed > free:
        raise ValueError(
            f"there is no room left for {folder}: it would take about {_gb(needed)} more and its disk has {_gb(free)}; "
            "make room, name a folder on another disk, or capture fewer images, sites or steps, or with storage fp8."
        )


def _missing(writer: ShardWriter, data: PromptData) -> frozenset[int]:
    return frozenset(shard for shard in range(data.n_shards) if not writer.is_complete(shard, data.samples(shard)))


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.3g} GB"


def _refuse_another(path: Path, spec: GenerationSpec, images_per_shard: int) -> None:
    """ValueError when `path` tells of another generation, or of shards of another size."""
    values = read_json(path)
    try:
        found, found_size = GenerationSpec.from_dict(values["spec"]), values["images_per_shard"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a capture's record (no {error}); remove its folder or name another."
        ) from error
    other = differences(found, spec)
    if found_size != images_per_shard:
        other.append(f"images_per_shard: {found_size!r} != {images_per_shard!r}")
    if other:
        raise ValueError(
            f"{path.parent} holds another capture ({'; '.join(other)}); name another folder or remove this one."
        )


def _prompt_line(prompt: Prompt) -> dict[str, Any]:
    return {"id": prompt.id, "prompt": prompt.text, "attributes": prompt.attributes}
