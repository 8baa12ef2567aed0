"""The emoji sprites, cut once from Noto Color Emoji into the sheet that ships beside this file.

`python -m scripts.tiny.sprites` makes the sheet anew; it needs the font (Debian: `fonts-noto-color-emoji`, SIL
Open Font License 1.1). Everything else reads the sheet and needs no font.
"""

from __future__ import annotations

import argparse
import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from scripts.tiny.vocabulary import OBJECTS

SHEET = Path(__file__).with_name("sprites.png")
SIDE = 96
COLUMNS = 10


@cache
def load_sprites() -> Float[Tensor, "n_objects 4 side side"]:
    """All sprites in the order of `OBJECTS`, RGBA in 0 to 1, colour premultiplied by alpha."""
    sheet = torch.from_numpy(np.asarray(Image.open(SHEET).convert("RGBA")).astype(np.float32) / 255)
    rows = sheet.shape[0] // SIDE
    cells = sheet.view(rows, SIDE, COLUMNS, SIDE, 4).permute(0, 2, 4, 1, 3).reshape(-1, 4, SIDE, SIDE)[: len(OBJECTS)]
    alpha = cells[:, 3:]
    return torch.cat([cells[:, :3] * alpha, alpha], dim=1)


def draw_sprite(emoji: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji, cropped to its ink, its longer side filling a SIDE × SIDE square."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((12, 12), emoji, font=font, embedded_color=True)
    ink = canvas.crop(canvas.getbbox())
    scale = (SIDE - 2) / max(ink.size)
    ink = ink.resize((round(ink.width * scale), round(ink.height * scale)), Image.Resampling.LANCZOS)
    sprite = Image.new("RGBA", (SIDE, SIDE))
    sprite.paste(ink, ((SIDE - ink.width) // 2, (SIDE - ink.height) // 2))
    return sprite


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut the emoji sprite sheet from the font.")
    parser.add_argument("--font", default="/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    font = ImageFont.truetype(parser.parse_args().font, 109)
    sheet = Image.new("RGBA", (COLUMNS * SIDE, math.ceil(len(OBJECTS) / COLUMNS) * SIDE))
    for index, emoji in enumerate(OBJECTS.values()):
        sheet.paste(draw_sprite(emoji, font), (index % COLUMNS * SIDE, index // COLUMNS * SIDE))
    sheet.save(SHEET, optimize=True)


if __name__ == "__main__":
    main()
