"""The README's pictures, from a finished study in runs/tiny/ and the bundled model: `python -m docs.images.make`."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import fluxsae
from fluxsae.files.tables import read_csv
from scripts.tiny.scenes import random_caption, render, to_tensors

RUN, OUT = Path("runs/tiny"), Path(__file__).parent


def save(picture: Image.Image, name: str, width: int) -> None:
    """At most `width` pixels wide, in 256 colours: a README loads them all."""
    picture = picture.convert("RGB")
    picture.thumbnail((width, 10 * width), Image.Resampling.LANCZOS)
    picture.quantize(256, dither=Image.Dither.NONE).save(OUT / name, optimize=True)


def scenes(n: int = 6) -> Image.Image:
    """Above, scenes as drawn for training; below, what the bundled model makes of captions of the same scenes."""
    rng = random.Random(3)
    pairs = [random_caption(rng, held_out=True, say_all=True) for _ in range(n)]
    drawn = render(to_tensors([scene for scene, _ in pairs]), torch.Generator().manual_seed(0)).images
    pixels = (drawn.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    pipe = fluxsae.load_pipeline("checkpoints/tiny-flux")
    captions = [caption.text for _, caption in pairs]
    made = fluxsae.generate(
        pipe, captions, list(range(n)), height=128, width=128, n_steps=20, guidance=3.5, text_length=32
    ).images
    assert made is not None
    sheet = Image.new("RGB", (n * 132 - 4, 2 * 132 + 12), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (head, pictures) in enumerate((("drawn", map(Image.fromarray, pixels)), ("generated", made))):
        draw.text((0, row * 142 - 1), head, fill="#444444")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (column * 132, row * 142 + 12))
    return sheet


def top_rows(sheet: Image.Image, n_rows: int, of: int = 20, head: float = 0.028) -> Image.Image:
    """The first rows of a contact sheet of `of` rows below a head that takes a share of its height."""
    return sheet.crop((0, 0, sheet.width, round(sheet.height * (head + (1 - head) * n_rows / of))))


def main() -> None:
    rows = fluxsae.Selection(RUN / "features.csv", 20).rows()
    named = max(rows, key=lambda row: (row.label_share or 0.0, row.coherence or 0.0))
    sheet = Image.open(RUN / "figures/contact_sheet.png")
    save(sheet, "contact_sheet.png", 760)
    save(top_rows(sheet, 6), "top_features.png", 760)
    save(Image.open(RUN / f"overlays/feature-{named.feature:05d}.png"), "overlays.png", 520)
    effects = read_csv(RUN / "steering/summary.csv")
    weakest = [row for row in effects if row["strength"] == effects[0]["strength"]]
    moved = max(weakest, key=lambda row: float(row["feature_clip_change"]) - float(row["random_clip_change"]))[
        "feature"
    ]
    save(Image.open(RUN / f"steering/feature-{int(moved):05d}.png"), "steering.png", 860)
    save(scenes(), "scenes.png", 900)


if __name__ == "__main__":
    main()
