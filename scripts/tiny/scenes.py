"""Scenes with known ground truth: one or two emoji on a plain background, their captions and masks.

Shapes: B scenes, S side of the image in pixels.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from scripts.tiny.sprites import load_sprites
from scripts.tiny.vocabulary import BACKGROUNDS, OBJECTS, PAIRS, PLACES, SIZES

OBJECT_NAMES = tuple(OBJECTS)
BACKGROUND_NAMES = tuple(BACKGROUNDS)
PLACE_NAMES = tuple(PLACES)
SIZE_NAMES = tuple(SIZES)
SIDE = 128


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    name: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """One object anywhere, or two opposite each other, on a plain background."""

    things: tuple[Thing, ...]
    background: str


class Caption(NamedTuple):
    """A caption and what it says: attribute name to value, the values of two objects joined by `|`."""

    text: str
    attributes: dict[str, str]


class Rendered(NamedTuple):
    """`images` in 0 to 1; `masks` is each object's coverage as seen (zeros where a scene has one object)."""

    images: Float[Tensor, "B 3 S S"]
    masks: Float[Tensor, "B 2 S S"]


def random_scene(rng: random.Random) -> Scene:
    """A scene drawn uniformly: half with one object, half with two different ones."""
    background = rng.choice(BACKGROUND_NAMES)
    if rng.random() < 0.5:
        return Scene((_thing(rng, rng.choice(OBJECT_NAMES), rng.choice(PLACE_NAMES)),), background)
    names = rng.sample(OBJECT_NAMES, 2)
    places = rng.sample(rng.choice(PAIRS), 2)
    return Scene(tuple(_thing(rng, name, place) for name, place in zip(names, places, strict=True)), background)


def describe(scene: Scene, rng: random.Random, *, say_all: bool = False) -> Caption:
    """A caption of the scene in one of several phrasings. Sizes and background are each left unsaid in one of four
    captions, and so is the place of a lone object, unless it is to say all; those of two objects are always said."""
    say_size, say_background, say_place = (say_all or rng.random() < 0.75 for _ in range(3))
    say_place = say_place or len(scene.things) == 2
    things = list(scene.things)
    phrases = [_phrase(thing, say_size, say_place, rng) for thing in things]
    text = rng.choice((" and ", ", ")).join(phrases) if len(phrases) == 2 else phrases[0]
    if say_background:
        text = rng.choice(
            (
                f"{text}, {scene.background} background",
                f"{text} on a {scene.background} background",
                f"{scene.background} background with {text}",
                f"{text}, {scene.background} backdrop",
            )
        )
    if rng.random() < 0.2:
        text = rng.choice(("a picture of ", "an emoji of ", "a drawing of ")) + text
    said = {"object": "|".join(thing.name for thing in things)}
    if say_background:
        said["background"] = scene.background
    if say_place:
        said["place"] = "|".join(thing.place for thing in things)
    if say_size:
        said["size"] = "|".join(thing.size for thing in things)
    return Caption(text, said)


def is_held_out(caption: str) -> bool:
    """Whether a caption is kept from every training: one in twenty, told by a hash of its text."""
    return hashlib.sha256(caption.encode()).digest()[0] < 13


def random_caption(rng: random.Random, *, held_out: bool, say_all: bool = False) -> tuple[Scene, Caption]:
    """A scene and a caption of it, drawn again until the caption is (or is not) one that no training sees."""
    while True:
        scene = random_scene(rng)
        caption = describe(scene, rng, say_all=say_all)
        if is_held_out(caption.text) == held_out:
            return scene, caption


class SceneTensors(NamedTuple):
    """Scenes as numbers: indices into the vocabulary, -1 for the second object of a scene that has one."""

    objects: Int[Tensor, "B 2"]
    sizes: Int[Tensor, "B 2"]
    places: Int[Tensor, "B 2"]
    background: Int[Tensor, "B"]


def to_tensors(scenes: list[Scene]) -> SceneTensors:
    def column(names: tuple[str, ...], field: str) -> Tensor:
        rows = [[names.index(getattr(thing, field)) for thing in scene.things] for scene in scenes]
        return torch.tensor([row + [-1] * (2 - len(row)) for row in rows])

    return SceneTensors(
        column(OBJECT_NAMES, "name"),
        column(SIZE_NAMES, "size"),
        column(PLACE_NAMES, "place"),
        torch.tensor([BACKGROUND_NAMES.index(scene.background) for scene in scenes]),
    )


def render(scenes: SceneTensors, generator: torch.Generator, side: int = SIDE, jitter: float = 1.0) -> Rendered:
    """Draw the scenes on the generator's device, each object at its place and size with a little jitter of both.

    At `jitter` 1: ±3 % of the side in position and ±6 % of the object's size. Background colours differ by ±3 levels in
    255 whatever the jitter.
    """
    device = generator.device
    objects, sizes, places, background = (column.to(device) for column in scenes)

    def noise(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device) * 2 - 1

    palette = torch.tensor(list(BACKGROUNDS.values()), device=device) / 255
    image = (palette[background] + noise(len(background), 3) * 3 / 255).clamp(0, 1)[:, :, None, None]
    image = image.expand(-1, -1, side, side)
    centres = torch.tensor(list(PLACES.values()), device=device)
    scales = torch.tensor(list(SIZES.values()), device=device)
    masks = []
    for slot in range(2):
        centre = centres[places[:, slot]] + noise(len(background), 2) * 0.03 * jitter
        scale = scales[sizes[:, slot]] * (1 + noise(len(background)) * 0.06 * jitter)
        layer = _place(objects[:, slot], centre, scale, side)
        layer = layer * (objects[:, slot] >= 0).view(-1, 1, 1, 1)
        alpha = layer[:, 3:]
        image = image * (1 - alpha) + layer[:, :3]
        masks.append(alpha[:, 0])
    return Rendered(image.clamp(0, 1), torch.stack(masks, 1))


def _place(
    objects: Int[Tensor, " B"], centre: Float[Tensor, "B 2"], scale: Float[Tensor, " B"], side: int
) -> Float[Tensor, "B 4 S S"]:
    """Sprites drawn into side × side canvases."""
    theta = torch.zeros(len(objects), 2, 3, device=objects.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = -(2 * centre - 1) / scale[:, None]
    grid = F.affine_grid(theta, [len(objects), 4, side, side], align_corners=False)
    small, large = _sprite_levels(side, objects.device)
    is_small = (scale < sum(SIZES.values()) / 2).view(-1, 1, 1, 1)
    small_layer, large_layer = (F.grid_sample(level[objects], grid, align_corners=False) for level in (small, large))
    return torch.where(is_small, small_layer, large_layer)


@cache
def _sprite_levels(side: int, device: torch.device) -> list[Float[Tensor, "n 4 P P"]]:
    """All sprites, filtered down to about the size of each of `SIZES` against aliasing, smallest first."""
    sprites = load_sprites().to(device)
    sizes = [round(side * size) for size in sorted(SIZES.values())]
    return [F.interpolate(sprites, (size, size), mode="bilinear", antialias=True) for size in sizes]


def _thing(rng: random.Random, name: str, place: str) -> Thing:
    return Thing(name, rng.choice(SIZE_NAMES), place)


def _phrase(thing: Thing, say_size: bool, say_place: bool, rng: random.Random) -> str:
    noun = f"{thing.size} {thing.name}" if say_size else thing.name
    noun = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    if not say_place:
        return noun
    if thing.place == "center":
        return f"{noun} {rng.choice(('in the center', 'in the middle'))}"
    return f"{noun} {rng.choice(('on the', 'at the', 'to the'))} {thing.place}"
