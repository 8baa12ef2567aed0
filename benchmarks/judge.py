"""Reads a picture of the bundled model's world, and says which attributes of a caption it shows.

Shapes: B pictures, S side in pixels, P parts of pictures that hold one object each, K object names, E width of a CLIP
embedding. Pictures are in 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from fluxsae.scoring.clip import Clip, embed, load_clip
from scripts.tiny.scenes import BACKGROUND_NAMES, OBJECT_NAMES, PLACE_NAMES, SIZE_NAMES, Scene
from scripts.tiny.vocabulary import BACKGROUNDS, PLACES, SIZES

TEMPLATES = ("a {}", "a small {}", "a large {}", "a picture of a {}", "an emoji of a {}", "a drawing of a {}")


class ZeroShot(NamedTuple):
    """A CLIP and what it makes of every object's name: the mean over `TEMPLATES`, of unit length."""

    clip: Clip
    names: Float[Tensor, "K E"]


class Verdict(NamedTuple):
    """Attribute name to value as found (two objects joined by `|`, none as ""), and to whether that is as said."""

    found: dict[str, str]
    right: dict[str, bool]


def judge(pictures: Float[Tensor, "B 3 S S"], said: Sequence[dict[str, str]], zero_shot: ZeroShot) -> list[Verdict]:
    """A verdict for each picture on the attributes that its caption says (`Caption.attributes`), and on no others.

    Two objects are looked at one by one, each in the half of the picture where the caption puts it. Their places are
    right when each half's object lies at its half's place, unless the two objects have changed places.
    """
    colours = background_colour(pictures)
    owners, parts = [], []
    for index, attributes in enumerate(said):
        places = attributes["place"].split("|") if "|" in attributes["object"] else [None]
        owners += [index] * len(places)
        parts += [pictures[index] if p is None else keep_half(pictures[index], p, colours[index]) for p in places]
    masks = foreground(torch.stack(parts))
    columns = {
        "object": _names(object_of(torch.stack(parts), zero_shot), OBJECT_NAMES),
        "place": _names(place_of(masks), PLACE_NAMES),
        "size": _names(size_of(masks), SIZE_NAMES),
    }
    found = [{"background": name} for name in _names(background_of(colours), BACKGROUND_NAMES)]
    for attribute, values in columns.items():
        for owner, value in zip(owners, values, strict=True):
            before = found[owner].get(attribute)
            found[owner][attribute] = value if before is None else f"{before}|{value}"
    return [_verdict(*pair) for pair in zip(found, said, strict=True)]


def truth(scene: Scene) -> dict[str, str]:
    """Every attribute of a scene, in the form of a caption's."""
    return {
        "object": "|".join(thing.name for thing in scene.things),
        "background": scene.background,
        "place": "|".join(thing.place for thing in scene.things),
        "size": "|".join(thing.size for thing in scene.things),
    }


def background_colour(pictures: Float[Tensor, "B 3 S S"], width: int = 3) -> Float[Tensor, "B 3"]:
    """The median colour of each picture's border, which no object covers by half."""
    border = torch.ones(pictures.shape[-2:], dtype=torch.bool, device=pictures.device)
    border[width:-width, width:-width] = False
    return pictures[:, :, border].median(dim=-1).values


def background_of(colours: Float[Tensor, "B 3"]) -> Int[Tensor, "B"]:
    """The nearest background of the vocabulary, an index into `BACKGROUND_NAMES`."""
    return _nearest(colours, torch.tensor(list(BACKGROUNDS.values())) / 255)


def foreground(pictures: Float[Tensor, "B 3 S S"], threshold: float = 0.1) -> Bool[Tensor, "B S S"]:
    """The pixels whose colour is further than `threshold` from the background's, specks of a pixel or two left out."""
    distance = (pictures - background_colour(pictures)[:, :, None, None]).norm(dim=1, keepdim=True)
    return F.avg_pool2d((distance > threshold).float(), 3, stride=1, padding=1)[:, 0] > 0.5


def place_of(masks: Bool[Tensor, "B S S"]) -> Int[Tensor, "B"]:
    """The place nearest to the foreground's centroid, an index into `PLACE_NAMES`; -1 where there is no foreground."""
    weights, side = masks.float(), masks.shape[-1]
    at = (torch.arange(side, device=masks.device) + 0.5) / side
    area = weights.sum(dim=(1, 2)).clamp(min=1)
    x, y = (weights.sum(dim=axis) @ at / area for axis in (1, 2))
    return _nearest(torch.stack([x, y], 1), torch.tensor(list(PLACES.values()))).where(masks.any(2).any(1), -1)


def size_of(masks: Bool[Tensor, "B S S"]) -> Int[Tensor, "B"]:
    """The size nearest to the longer side of the foreground's box, an index into `SIZE_NAMES`; -1 without one."""
    extent = torch.stack([_extent(masks.any(axis)) for axis in (1, 2)]).amax(0) / masks.shape[-1]
    return _nearest(extent[:, None], torch.tensor(list(SIZES.values()))[:, None]).where(masks.any(2).any(1), -1)


def object_of(parts: Float[Tensor, "P 3 S S"], zero_shot: ZeroShot) -> Int[Tensor, "P"]:
    """The object whose name CLIP finds nearest, an index into `OBJECT_NAMES`."""
    embeddings = embed(zero_shot.clip, (to_pil_image(part.cpu()) for part in parts))
    return (embeddings @ zero_shot.names.T).argmax(dim=1)


def keep_half(picture: Float[Tensor, "3 S S"], place: str, colour: Float[Tensor, "3"]) -> Float[Tensor, "3 S S"]:
    """The half of a picture where `place` is, the other half filled with `colour`.

    Raises ValueError for the centre, which is in no half.
    """
    x, y = PLACES[place]
    if x == y == 0.5:
        raise ValueError(f"{place!r} is in no half of a picture; two objects stand left and right, or top and bottom.")
    at = (torch.arange(picture.shape[-1], device=picture.device) + 0.5) / picture.shape[-1]
    across, along = ((at < 0.5) == (x < 0.5))[None, None, :], ((at < 0.5) == (y < 0.5))[None, :, None]
    return torch.where(across if x != 0.5 else along, picture, colour[:, None, None])


@torch.inference_mode()
def load_zero_shot(folder: Path, device: torch.device | str = "cpu") -> ZeroShot:
    """The CLIP in an open_clip folder, with the embeddings of all object names."""
    clip = load_clip(f"local-dir:{folder}", device)
    model: Any = clip.model
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    texts = [with_article(template.format(name), name) for name in OBJECT_NAMES for template in TEMPLATES]
    embeddings = model.encode_text(tokenizer(texts).to(device), normalize=True).float().cpu()
    return ZeroShot(clip, F.normalize(embeddings.view(len(OBJECT_NAMES), len(TEMPLATES), -1).mean(1), dim=1))


def with_article(text: str, name: str) -> str:
    """`text` with `a` before `name` as `an` where that is how it is said."""
    return text.replace(f"a {name}", f"an {name}") if name[0] in "aeiou" else text


def _verdict(found: dict[str, str], said: dict[str, str]) -> Verdict:
    right = {attribute: found[attribute] == value for attribute, value in said.items()}
    names = said["object"].split("|")
    if len(names) == 2 and found["object"].split("|") == names[::-1]:
        right["place"] = False
    return Verdict(found, right)


def _nearest(points: Float[Tensor, "B C"], candidates: Float[Tensor, "N C"]) -> Int[Tensor, "B"]:
    return (points[:, None] - candidates.to(points)).norm(dim=-1).argmin(dim=1)


def _extent(covered: Bool[Tensor, "B S"]) -> Float[Tensor, "B"]:
    """From the first covered position to the last, in pixels."""
    first, last = (line.float().argmax(dim=1) for line in (covered, covered.flip(1)))
    return (covered.shape[1] - last - first).float()


def _names(indices: Int[Tensor, "B"], names: Sequence[str]) -> list[str]:
    return [names[index] if index >= 0 else "" for index in indices.tolist()]
