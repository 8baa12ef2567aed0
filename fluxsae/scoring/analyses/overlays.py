"""Where on an image a feature is active: its codes over the token grid, laid over the picture that was captured.

Legend: M images, H × W pixels, R × C token grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from lightning.pytorch import LightningModule, Trainer
from matplotlib import colormaps
from PIL import Image

from fluxsae.data import TokenBatch
from fluxsae.files import read_csv, read_json, whole_file, write_csv, write_json
from fluxsae.records import Selection, parse_site
from fluxsae.runtime import OneRunOnly, SharedArray
from fluxsae.scoring.analyses.coherence import check_images
from fluxsae.scoring.map_files import MAPS, FeatureMaps, MapFile, MapIndex
from fluxsae.scoring.maps import map_images, reading_of
from fluxsae.scoring.reading import CodeReading, shards_of
from fluxsae.shards import ShardSet

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


class Overlays(OneRunOnly):
    """Writes maps of codes on top images, and draws pictures of selected features. No image is generated again.

    Use it with `FeatureMapping`. `SAEScoring` works too, as in the first edition, but is slower.

    `maps.npy` [P, R, C] holds all maps, and `maps-index.npy` says which feature and image each of them shows. Pictures
    are called `feature-00017.png`. `overlays.csv` has one row for each image in a picture: its largest code, the place
    of that code on the token grid, the code shown in full colour, and the row of its map.

    Args:
        folder: where to write.
        images: folder of the captured images.
        select: the features to draw, and how many of their top images.
        mode: `smooth` interpolates between tokens, `patch` shows each token as 16×16 pixels.
        clip_percentile: the percentile of the codes that is shown in full colour.
        scale: `shared` is one colour scale for all images of a feature, `image` is one for each image.
        colormap: a colour map of matplotlib.
        side_by_side: put the plain image to the left of each overlay.
        keep: the features and top images whose maps are kept, in addition to those that are drawn. The data's `only`
            must include all these images.
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
        keep: Selection | None = None,
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
        self.keep = keep
        self._index = MapIndex.of()
        self._maps: SharedArray | None = None
        self._module: CodeReading

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, shards = reading_of(pl_module, self), shards_of(trainer)
        if parse_site(shards.spec.site).stream == "text":
            raise ValueError(
                f"{shards.spec.site} has text tokens, which lie nowhere on an image; overlay an image site."
            )
        check_images(ShardSet.open(self.images, "images"), shards)
        kept = [(self.keep.rows(), self.keep.n_images)] if self.keep is not None else []
        self._module = module
        self._index = MapIndex.of((self.select.rows(), self.select.n_images), *kept)
        if trainer.is_global_zero:
            (self.folder / TABLE).unlink(missing_ok=True)
        self._maps = SharedArray(trainer, self.folder / MAPS, (len(self._index), *shards.spec.generation.grid))

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TokenBatch, batch_idx: int, *_: Any
    ) -> None:
        assert self._maps is not None
        found = map_images(self._index, self._module.pooling, batch.images, batch.tokens)
        if found is not None:
            finite = bool(np.isfinite(found.maps).all())
            self._module.check_finite(finite=finite, images=batch.images.tolist(), what="a code")
            self._maps.write(found.rows, found.maps.reshape(len(found.rows), *self._maps.array.shape[1:]))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._maps is not None
        n_written = self._maps.n_written(trainer)
        if n_written != len(self._index):
            raise ValueError(
                f"{n_written} of {len(self._index)} maps could be made: the data's `only` leaves out images that are "
                "to be shown; select the same, or more, there."
            )
        if trainer.is_global_zero:
            self._maps.finish()
            self._index.save(self.folder)
            self._draw()
        trainer.strategy.barrier("overlays")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._maps is not None:
            self._maps.discard(exception)
        super().on_exception(trainer, pl_module, exception)

    def _draw(self) -> None:
        images, maps = ShardSet.open(self.images, "images"), MapFile.open(self.folder)
        rows: list[dict[str, Any]] = []
        for selected in self.select.rows():
            feature = maps.of(selected.feature, self.select.n_images)
            if not feature.images:
                continue
            tops = scales(feature.maps, self.clip_percentile, self.scale)
            rows += table_rows(feature, tops, maps.index.of_feature(feature.feature).start)
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


def table_rows(feature: FeatureMaps, tops: list[float], first_map: int) -> list[dict[str, Any]]:
    """The rows of `overlays.csv` for one feature, whose maps begin at row `first_map` of their file."""
    rows = []
    for rank, (image, codes, top) in enumerate(zip(feature.images, feature.maps, tops, strict=True)):
        row, column = divmod(int(codes.argmax()), codes.shape[1])
        values = (feature.feature, rank, image, float(codes.max()), top, row, column, first_map + rank)
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
    """What `Overlays` left: how it drew, the clip values of every drawn feature's images, and the maps of all."""

    settings: dict[str, Any]
    scales: dict[int, list[float]]
    maps: MapFile

    def of(self, feature: int, n_images: int) -> tuple[FeatureMaps, list[float]]:
        """A feature's maps on its best images, and their clip values: those drawn with, or as they would be."""
        found, tops = self.maps.of(feature, n_images), self.scales.get(feature, [])
        if len(tops) < len(found.images):
            tops = scales(found.maps, self.settings["clip_percentile"], self.settings["scale"])
        return found, tops[: len(found.images)]


def read_overlays(folder: str | Path) -> OverlayFolder:
    """FileNotFoundError when the folder holds no finished overlays."""
    folder = Path(folder)
    if not (folder / TABLE).exists():
        raise FileNotFoundError(f"there are no finished overlays in {folder}; run the overlays stage first.")
    tops: dict[int, list[float]] = {}
    for row in read_csv(folder / TABLE):
        tops.setdefault(int(row["feature"]), []).append(float(row["scale"]))
    return OverlayFolder(read_json(folder / SUMMARY), tops, MapFile.open(folder))
