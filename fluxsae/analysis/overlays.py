"""Where on an image a feature is active: its codes over the token grid, laid over the picture that was captured.

Legend: M images, T tokens an image, H × W pixels, R × C token grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from lightning.pytorch import LightningModule, Trainer
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from fluxsae.analysis.coherence import check_images
from fluxsae.analysis.gather import gather
from fluxsae.features import Feature, Selection
from fluxsae.one_run import OneRunOnly
from fluxsae.scoring import ImageScores, scored_shards
from fluxsae.shards.read import ShardSet
from fluxsae.spec import Grid, parse_site
from fluxsae.storage import read_csv, read_json, whole_file, write_csv, write_json

Mode = Literal["smooth", "patch"]
Scale = Literal["shared", "image"]
TABLE, SUMMARY = "overlays.csv", "overlays.json"
COLUMNS = ("feature", "rank", "image", "max", "scale", "row", "column", "map")


def overlay(
    image: Image.Image,
    codes: Float[np.ndarray, "R C"],
    scale: float,
    mode: Mode = "smooth",
    colormap: str = "inferno",
) -> Image.Image:
    """The picture, greyed, with the codes' map over it: codes of `scale` and above in full colour, 0 not at all.

    `smooth` interpolates between token centres, `patch` shows each token as the 16×16 pixels that it stands for.
    """
    picture = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    strength = _stretch(np.clip(codes / scale, 0, 1) if scale > 0 else np.zeros_like(codes), image.size, mode)
    colour = np.asarray(_colours(colormap)(strength), dtype=np.float32)[..., :3]
    grey = (picture @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]
    # Weak codes hardly tint, so that the picture stays readable; strong ones keep a trace of it.
    alpha = 0.8 * strength[..., None] ** 0.8
    backdrop = 0.7 * (0.65 * grey + 0.35 * picture)
    # Colours are darkened where the picture is dark, so that its lines show through.
    blended = (1 - alpha) * backdrop + alpha * colour * (0.68 + 0.4 * grey)
    return Image.fromarray(_to_bytes(blended))


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures of one size in one, without a gap."""
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left.convert("RGB"), (0, 0))
    both.paste(right, (left.width, 0))
    return both


def clip_value(maps: Float[np.ndarray, "*M R C"], percentile: float) -> float:
    """The percentile of some maps' codes at which colour saturates; the largest code where it would be 0."""
    return float(np.percentile(maps, percentile)) or float(maps.max())


def scales(maps: Float[np.ndarray, "M R C"], percentile: float, scale: Scale) -> list[float]:
    """One clip value an image: of each map by itself, or one of all."""
    if scale == "image":
        return [clip_value(one, percentile) for one in maps]
    return [clip_value(maps, percentile)] * len(maps)


def _stretch(values: Float[np.ndarray, "R C"], size: tuple[int, int], mode: Mode) -> Float[np.ndarray, "H W"]:
    how = Image.Resampling.BICUBIC if mode == "smooth" else Image.Resampling.NEAREST
    stretched = Image.fromarray(values.astype(np.float32)).resize(size, how)
    return np.clip(np.asarray(stretched), 0, 1)


def _colours(name: str) -> Any:
    if name not in colormaps:
        raise ValueError(
            f"colormap {name!r} is none of matplotlib's; use 'inferno', 'viridis' or 'cividis', for example."
        )
    return colormaps[name]


def _to_bytes(values: Float[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    return (np.clip(values, 0, 1) * 255).round().astype(np.uint8)


class FeatureMaps(NamedTuple):
    """A feature's codes over the token grids of its top images."""

    feature: int
    images: tuple[int, ...]
    maps: Float[np.ndarray, "M R C"]


class Overlays(OneRunOnly):
    """Leaves for each selected feature its top images with overlays, and the maps behind them; generates nothing again.

    Files are `feature-00017.png` and `feature-00017.npy` [M, R, C]. `overlays.csv` has a row an image: its largest
    code, where on the grid that is, and the code shown in full colour.

    Args:
        folder: where to write.
        images: folder of the captured images.
        select: which features and how many of their top images.
        mode: `smooth` or `patch`.
        clip_percentile: the percentile of the codes that is shown in full colour.
        scale: one for all images of a feature, or one an image.
        colormap: a colour map of matplotlib.
        side_by_side: the picture itself to the left of each overlay.
    """

    def __init__(
        self,
        folder: Path,
        images: Path,
        select: Selection,
        mode: Mode = "smooth",
        clip_percentile: float = 99.0,
        scale: Scale = "shared",
        colormap: str = "inferno",
        side_by_side: bool = True,
    ) -> None:
        if not 0 < clip_percentile <= 100:
            raise ValueError(f"clip_percentile is {clip_percentile}, expected more than 0 and at most 100.")
        _colours(colormap)
        super().__init__(folder)
        self.images = Path(images)
        self.select = select
        self.mode: Mode = mode
        self.clip_percentile = clip_percentile
        self.scale: Scale = scale
        self.colormap = colormap
        self.side_by_side = side_by_side
        self._rows: list[Feature] = []
        self._wanted: dict[int, list[tuple[int, int]]] = {}
        self._maps: Tensor | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shards = scored_shards(trainer)
        if parse_site(shards.spec.site).stream == "text":
            raise ValueError(
                f"{shards.spec.site} has text tokens, which lie nowhere on an image; overlay an image site."
            )
        check_images(ShardSet.open(self.images, "images"), shards)
        self._rows = self.select.rows()
        self._wanted = {}
        for row, feature in enumerate(self._rows):
            for column, image in enumerate(feature.top_images[: self.select.n_images]):
                self._wanted.setdefault(image, []).append((row, column))
        shape = (len(self._rows), self.select.n_images, shards.spec.n_tokens)
        self._maps = torch.zeros(shape, device=pl_module.device)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        assert isinstance(outputs, ImageScores) and self._maps is not None
        for i, image in enumerate(outputs.images.tolist()):
            for row, column in self._wanted.get(image, ()):
                self._maps[row, column] = outputs.codes[i, :, self._rows[row].feature]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._maps is not None
        maps = gather(trainer, self._maps).sum(dim=0).cpu()  # each image was in one process only
        if trainer.is_global_zero:
            grid = scored_shards(trainer).spec.generation.grid
            self._write(
                [
                    _feature_maps(row, flat, grid, self.select.n_images)
                    for row, flat in zip(self._rows, maps, strict=True)
                ]
            )
        trainer.strategy.barrier("overlays")

    def _write(self, features: list[FeatureMaps]) -> None:
        images = ShardSet.open(self.images, "images")
        rows: list[dict[str, Any]] = []
        for feature in features:
            tops = scales(feature.maps, self.clip_percentile, self.scale) if feature.images else []
            rows += table_rows(feature, tops)
            with whole_file(self.folder / map_name(feature.feature)) as temporary:
                np.save(temporary, feature.maps)
            if feature.images:
                sheet = self._sheet(feature, tops, images)
                with whole_file(self.folder / f"feature-{feature.feature:05d}.png") as temporary:
                    sheet.save(temporary)
        settings = {
            "images": str(self.images),
            "mode": self.mode,
            "clip_percentile": self.clip_percentile,
            "scale": self.scale,
            "colormap": self.colormap,
        }
        write_json(self.folder / SUMMARY, settings)
        write_csv(self.folder / TABLE, rows, COLUMNS)

    def _sheet(self, feature: FeatureMaps, tops: list[float], images: ShardSet) -> Image.Image:
        tiles = []
        for image, codes, top in zip(feature.images, feature.maps, tops, strict=True):
            picture = images.image(image)
            laid = overlay(picture, codes, top, self.mode, self.colormap)
            tiles.append(side_by_side(picture, laid) if self.side_by_side else laid)
        return tile(tiles)


def _feature_maps(row: Feature, flat: Float[Tensor, "M T"], grid: Grid, n_images: int) -> FeatureMaps:
    images = row.top_images[:n_images]
    return FeatureMaps(row.feature, images, flat[: len(images)].float().numpy().reshape(len(images), *grid))


def map_name(feature: int) -> str:
    return f"feature-{feature:05d}.npy"


def table_rows(feature: FeatureMaps, tops: list[float]) -> list[dict[str, Any]]:
    """The rows of `overlays.csv` for one feature."""
    rows = []
    for rank, (image, codes, top) in enumerate(zip(feature.images, feature.maps, tops, strict=True)):
        row, column = divmod(int(codes.argmax()), codes.shape[1])
        values = (feature.feature, rank, image, float(codes.max()), top, row, column, map_name(feature.feature))
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def tile(tiles: list[Image.Image], gap: int = 4) -> Image.Image:
    """Pictures of one size in a grid that is about as wide as high."""
    width, height = tiles[0].size
    columns = min(len(tiles), max(1, round((len(tiles) * height / width) ** 0.5)))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(tiles):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


class OverlayFolder(NamedTuple):
    """What `Overlays` left: how it drew, and the maps and clip values of every feature's images."""

    settings: dict[str, Any]
    features: dict[int, FeatureMaps]
    scales: dict[int, list[float]]


def read_overlays(folder: str | Path) -> OverlayFolder:
    """FileNotFoundError when the folder holds no finished overlays."""
    folder = Path(folder)
    if not (folder / TABLE).exists():
        raise FileNotFoundError(f"there are no finished overlays in {folder}; run the overlays stage first.")
    images: dict[int, list[int]] = {}
    tops: dict[int, list[float]] = {}
    for row in read_csv(folder / TABLE):
        images.setdefault(int(row["feature"]), []).append(int(row["image"]))
        tops.setdefault(int(row["feature"]), []).append(float(row["scale"]))
    features = {f: FeatureMaps(f, tuple(ids), np.load(folder / map_name(f))) for f, ids in images.items()}
    return OverlayFolder(read_json(folder / SUMMARY), features, tops)
