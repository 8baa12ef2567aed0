"""A picture a feature of what steering does: a row an image, a column a strength, random directions at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from PIL import Image, ImageDraw, ImageFont

from fluxsae.files import whole_file, write_csv
from fluxsae.records import shown
from fluxsae.runtime import OneRunOnly, gather_objects
from fluxsae.steering.module import FluxSteering, Steered, Variant

GAP, TITLE, MARGIN = 6, 30, 38
CAPTION, MIN_CELL = 190, 76
"""Pixels: between pictures, for the title and the heads of columns, for the prompts at the left, and of a column."""
INK = "#222222"


def grid(
    rows: Sequence[Sequence[Image.Image]], heads: Sequence[str], captions: Sequence[str], title: str = ""
) -> Image.Image:
    """Pictures of one size in rows and columns, under a head a column and beside a caption a row."""
    width, height = rows[0][0].size
    cell = max(width, MIN_CELL) + GAP
    font = ImageFont.load_default(size=12)
    canvas = Image.new("RGB", (CAPTION + len(heads) * cell, TITLE + MARGIN + len(rows) * (height + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, TITLE / 2), title, fill=INK, font=ImageFont.load_default(size=15), anchor="lm")
    for column, head in enumerate(heads):
        middle = (CAPTION + (column + 0.5) * cell, TITLE + MARGIN / 2)
        draw.text(middle, head, fill=INK, font=font, anchor="mm", align="center")
    for row, (pictures, caption) in enumerate(zip(rows, captions, strict=True)):
        top = TITLE + MARGIN + row * (height + GAP)
        draw.multiline_text((GAP, top + GAP), _wrap(caption, font, CAPTION - 3 * GAP), fill=INK, font=font)
        for column, picture in enumerate(pictures):
            canvas.paste(picture, (CAPTION + column * cell + (cell - width) // 2, top))
    return canvas


class SteeringGrids(OneRunOnly):
    """Draws a grid of images for each steered feature: one row an image, one column a variant.

    Grids are called `feature-00017.png`. `grids.csv` says which prompt, seed and variant each place shows.

    Args:
        folder: where the pictures go.
        max_rows: the most images in a grid.
    """

    def __init__(self, folder: Path, max_rows: int = 12) -> None:
        super().__init__(folder)
        self.max_rows = max_rows
        self._batches: list[Steered] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, FluxSteering)
        self._batches = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        assert isinstance(outputs, Steered)
        if sum(len(steered.requests) for steered in self._batches) < self.max_rows:
            self._batches.append(outputs)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, FluxSteering)
        batches = gather_objects(trainer, self._batches)
        if trainer.is_global_zero:
            labels = {row.feature: row.label for row in pl_module.rows}
            self._write(sorted(batches, key=lambda steered: steered.requests[0].image), labels)
        trainer.strategy.barrier("steering grids")

    def _write(self, batches: list[Steered], labels: dict[int, str]) -> None:
        rows: list[dict[str, Any]] = []
        for feature in batches[0].features:
            columns = _columns(batches[0].variants, feature)
            rows_shown = [(steered, i) for steered in batches for i in range(len(steered.requests))][: self.max_rows]
            heads = [_head(steered_variant) for steered_variant in (batches[0].variants[v] for v in columns)]
            picture = grid(
                [[steered.images[v][i] for v in columns] for steered, i in rows_shown],
                heads,
                [shown(steered.requests[i].prompt) for steered, i in rows_shown],
                f"feature {feature}   {shown(labels.get(feature, '').replace('=', ' ', 1))}".rstrip(),
            )
            name = f"feature-{feature:05d}.png"
            with whole_file(self.folder / name) as temporary:
                picture.save(temporary)
            for row, (steered, i) in enumerate(rows_shown):
                request = steered.requests[i]
                for column, head in enumerate(heads):
                    place = {"picture": name, "feature": feature, "label": labels.get(feature, ""), "row": row}
                    rows.append({**place, "column": column, "variant": head.replace("\n", " "), **request._asdict()})
        fields = ("picture", "feature", "label", "row", "column", "variant", "image", "prompt", "seed")
        write_csv(self.folder / "grids.csv", rows, fields)


def _columns(variants: list[Variant], feature: int) -> list[int]:
    """Indices of a grid's columns: unsteered, the feature by strength, one random direction by strength."""

    def wanted(variant: Variant) -> bool:
        return variant.kind == "baseline" or (variant.feature in (feature, None) and variant.draw == 0)

    order = {"baseline": 0, "feature": 1, "random": 2}
    chosen = [i for i, variant in enumerate(variants) if wanted(variant)]
    return sorted(chosen, key=lambda i: (order[variants[i].kind], variants[i].strength))


def _head(variant: Variant) -> str:
    return "unsteered" if variant.kind == "baseline" else f"{variant.kind}\n{variant.strength:+g}"


def _wrap(text: str, font: Any, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines[:6])
