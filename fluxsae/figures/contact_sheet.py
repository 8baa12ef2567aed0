"""The contact sheet: a feature a row, an example image a column, and in the margin the feature's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image, ImageDraw

from fluxsae.figures.style import BLUE, FAINT, INK, MUTED, ORANGE, font
from fluxsae.files import whole_file, write_csv
from fluxsae.records import Feature, Selection, shown
from fluxsae.scoring import overlay, read_overlays
from fluxsae.shards import ShardSet

SheetLayout = Literal["pairs", "overlays"]
Points = int | float


class Example(NamedTuple):
    """One top image of a feature: its index, the picture, and the picture with the feature's map over it."""

    image: int
    original: Image.Image
    overlay: Image.Image


class SheetRow(NamedTuple):
    """A feature and its examples, best first, and by which column of the table it was chosen."""

    feature: Feature
    examples: list[Example]
    rank_by: str = "coherence"


def sheet_rows(select: Selection, images: Path, overlays: Path) -> list[SheetRow]:
    """The selected features that have maps, drawn over the captured images.

    FileNotFoundError when images or overlays are missing, ValueError when no selected feature has maps.
    """
    pictures, drawn = ShardSet.open(images, "images"), read_overlays(overlays)
    mode, colormap = drawn.settings["mode"], drawn.settings["colormap"]
    rows = []
    for feature in select.rows():
        maps, tops = drawn.of(feature.feature, select.n_images)
        examples = []
        for image, codes, top in zip(maps.images, maps.maps, tops, strict=True):
            picture = pictures.image(image)
            examples.append(Example(image, picture, overlay(picture, codes, top, mode, colormap)))
        if examples:
            rows.append(SheetRow(feature, examples, select.rank_by))
    if not rows:
        raise ValueError(f"{overlays} has no maps of the selected features; run the overlays stage again.")
    return rows


def contact_sheet(
    rows: Sequence[SheetRow],
    path: Path,
    *,
    layout: SheetLayout = "pairs",
    tile: int = 104,
    title: str = "",
    zoom: int = 2,
) -> None:
    """Draw the sheet to `path` and its numbers beside it, as a CSV of the same name.

    Args:
        rows: features with their examples.
        path: a .png file.
        layout: each example as a pair original | overlay, or only the overlay.
        tile: height of a picture in points of the sheet.
        title: a line above the sheet.
        zoom: pixels a point, so that the sheet is sharp on a fine screen.
    """
    path = Path(path)
    sheet = _Sheet(rows, layout, tile, bool(title), zoom)
    if title:
        sheet.write((0, 2), title, 17, INK, bold=True)
        sheet.legend(layout)
    for i, row in enumerate(rows):
        sheet.header(i, row.feature, row.rank_by)
        sheet.examples(i, row.examples)
    with whole_file(path) as temporary:
        sheet.picture.save(temporary)
    ranked = sorted({row.rank_by for row in rows} - set(_COLUMNS))
    write_csv(path.with_suffix(".csv"), [_numbers(row) for row in rows], [*_COLUMNS, *ranked])


_COLUMNS = ("feature", "label", "label_share", "coherence", "coherence_null", "frequency", "images")
_HEADER, _GAP, _ROW_GAP, _MARGIN, _TITLE = 200, 7, 9, 16, 52


class _Sheet:
    """A canvas measured in points of `zoom` pixels."""

    def __init__(self, rows: Sequence[SheetRow], layout: SheetLayout, tile: int, titled: bool, zoom: int) -> None:
        first = rows[0].examples[0].original
        self.layout = layout
        self.zoom = zoom
        self.height = tile
        self.width = round(tile * first.width / first.height)
        self.cell = self.width * (2 if layout == "pairs" else 1)
        self.top = _TITLE if titled else 0
        n_columns = max(len(row.examples) for row in rows)
        width = 2 * _MARGIN + _HEADER + n_columns * (self.cell + _GAP) - _GAP
        height = 2 * _MARGIN + self.top + len(rows) * (tile + _ROW_GAP) - _ROW_GAP
        self.picture = Image.new("RGB", (width * zoom, height * zoom), "white")
        self.draw = ImageDraw.Draw(self.picture)
        self.right = width - 2 * _MARGIN
        values = [v for row in rows for v in (row.feature.coherence, row.feature.coherence_null) if v is not None]
        self.low, self.high = (min(0.0, *values), max(values)) if values else (0.0, 1.0)

    def write(
        self, at: tuple[Points, Points], text: str, size: int, colour: str, *, bold: bool = False, anchor: str = "la"
    ) -> None:
        self.draw.text(self._at(*at), text, fill=colour, font=font(size * self.zoom, bold), anchor=anchor)

    def legend(self, layout: SheetLayout) -> None:
        """What bar and tick mean, and how strength is coloured."""
        what = (
            "top images · left: as generated, right: where the feature is active" if layout == "pairs" else "top images"
        )
        self.write((_HEADER, 30), f"{what} · strongest first", 11, MUTED)
        self.box((0, 34, 18, 39), BLUE)
        self.write((23, 30), "CLIP coherence", 11, MUTED)
        self.box((122, 31, 124, 42), ORANGE)
        self.write((129, 30), "random", 11, MUTED)

    def header(self, i: int, feature: Feature, rank_by: str) -> None:
        y = self.top + i * (self.height + _ROW_GAP)
        if i:
            self.box((0, y - _ROW_GAP / 2 - 0.25, self.right, y - _ROW_GAP / 2 + 0.25), FAINT)
        name, value = _title(feature)
        self.write((0, y + 3), self._fit(value, 15, True), 15, INK, bold=True)
        self.write((0, y + 24), self._fit(name, 11, False), 11, MUTED)
        if feature.coherence is not None:
            self._coherence(y + 46, feature)
        if feature.frequency is not None:
            self.write((0, y + 66), f"active on {feature.frequency:.1%} of images", 11, MUTED)
        ranked = feature.columns.get(rank_by)
        if rank_by not in _COLUMNS and ranked is not None:
            self.write((0, y + 83), self._fit(f"{rank_by} {ranked:.4g}", 11, False), 11, MUTED)

    def examples(self, i: int, examples: Sequence[Example]) -> None:
        y = self.top + i * (self.height + _ROW_GAP)
        for column, example in enumerate(examples):
            x = _HEADER + column * (self.cell + _GAP)
            shown = [example.original, example.overlay] if self.layout == "pairs" else [example.overlay]
            for k, picture in enumerate(shown):
                size = (self.width * self.zoom, self.height * self.zoom)
                scaled = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
                self.picture.paste(scaled, self._at(x + k * self.width, y))

    def box(self, edges: tuple[Points, Points, Points, Points], colour: str) -> None:
        left, top, right, bottom = edges
        (x0, y0), (x1, y1) = self._at(left, top), self._at(right, bottom)
        if x1 > x0 and y1 > y0:  # the least coherent feature's bar has no width
            self.draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=colour)

    def _coherence(self, y: Points, feature: Feature) -> None:
        assert feature.coherence is not None
        span = _HEADER - 66
        scale = span / max(self.high - self.low, 1e-6)
        self.box((0, y + 4, span, y + 9), FAINT)
        self.box((0, y + 4, (feature.coherence - self.low) * scale, y + 9), BLUE)
        if feature.coherence_null is not None:
            x = (feature.coherence_null - self.low) * scale
            self.box((x - 1, y, x + 1, y + 13), ORANGE)
        self.write((span + 8, y - 1), f"{feature.coherence:.2f}", 12, BLUE, bold=True)

    def _fit(self, text: str, size: int, bold: bool) -> str:
        room = (_HEADER - 12) * self.zoom
        if font(size * self.zoom, bold).getlength(text) <= room:
            return text
        while text and font(size * self.zoom, bold).getlength(text + "…") > room:
            text = text[:-1]
        return text.rstrip() + "…"

    def _at(self, x: Points, y: Points) -> tuple[int, int]:
        return round((_MARGIN + x) * self.zoom), round((_MARGIN + y) * self.zoom)


def _title(feature: Feature) -> tuple[str, str]:
    """The small line and the large line of a header."""
    if not feature.label:
        return "no shared attribute known", f"feature {feature.feature}"
    name, _, value = shown(feature.label).partition("=")
    share = "" if feature.label_share is None else f" · {name} {feature.label_share:.0%}"
    return f"feature {feature.feature}{share}", value or name


def _numbers(row: SheetRow) -> dict[str, Any]:
    return {**row.feature.columns, "images": " ".join(str(example.image) for example in row.examples)}
