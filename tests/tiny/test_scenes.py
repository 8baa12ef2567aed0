"""Scenes are what their captions say, drawn where their masks say, the same for the same seed."""

from __future__ import annotations

import random

import pytest
import torch

from scripts.tiny.scenes import (
    OBJECT_NAMES,
    PLACE_NAMES,
    SIDE,
    SIZE_NAMES,
    Rendered,
    Scene,
    Thing,
    describe,
    is_held_out,
    random_caption,
    random_scene,
    render,
    to_tensors,
)
from scripts.tiny.sprites import load_sprites
from scripts.tiny.vocabulary import BACKGROUNDS, PAIRS, PLACES, SIZES


def drawn(scenes: list[Scene], seed: int = 0, side: int = SIDE) -> Rendered:
    return render(to_tensors(scenes), torch.Generator().manual_seed(seed), side)


def some(n: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng) for _ in range(n)]


def test_the_same_seed_draws_the_same_pictures() -> None:
    first, again, other = drawn(some(6)), drawn(some(6)), drawn(some(6), seed=1)
    assert torch.equal(first.images, again.images) and torch.equal(first.masks, again.masks)
    assert not torch.equal(first.images, other.images)


def test_images_are_in_0_to_1_and_a_lone_object_has_an_empty_second_mask() -> None:
    scenes = some(40)
    images, masks = drawn(scenes)
    assert images.shape == (40, 3, SIDE, SIDE) and images.min() >= 0 and images.max() <= 1
    for scene, mask in zip(scenes, masks, strict=True):
        assert (mask.amax((1, 2)) > 0.9).tolist() == [True, len(scene.things) == 2]


def test_away_from_the_masks_there_is_background() -> None:
    scenes = some(40)
    images, masks = drawn(scenes)
    for scene, image, mask in zip(scenes, images, masks, strict=True):
        plain = image[:, mask.amax(0) == 0]
        colour = torch.tensor(BACKGROUNDS[scene.background]) / 255
        assert (plain - colour[:, None]).abs().max() <= 3.01 / 255


@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("size", SIZE_NAMES)
@pytest.mark.parametrize("place", PLACE_NAMES)
def test_an_object_lies_at_its_place_in_its_size(place: str, size: str, side: int) -> None:
    scenes = [Scene((Thing(name, size, place),), "blue") for name in OBJECT_NAMES[:12]]
    for mask in drawn(scenes, side=side).masks[:, 0]:
        y, x = (mask > 0.5).nonzero().float().T
        box = torch.stack([x.min() + x.max() + 1, y.min() + y.max() + 1]) / 2 / side
        assert (box - torch.tensor(PLACES[place])).abs().max() < 0.05
        extent = max(x.max() - x.min(), y.max() - y.min()).item() + 1
        soft_edge_and_jitter = 2 + 0.08 * SIZES[size] * side
        assert extent == pytest.approx(SIZES[size] * side, abs=soft_edge_and_jitter)


def test_scenes_have_one_object_or_two_different_ones_opposite_each_other() -> None:
    scenes = some(400)
    two = [scene.things for scene in scenes if len(scene.things) == 2]
    assert 150 < len(two) < 250
    for a, b in two:
        assert a.name != b.name and any({a.place, b.place} == set(pair) for pair in PAIRS)


def test_captions_say_their_attributes_and_leave_some_unsaid() -> None:
    rng = random.Random(0)
    captions = [describe(scene, rng) for scene in some(400)]
    for text, said in captions:
        words = [value for values in said.values() for value in values.split("|")]
        assert all(word in text or (word == "center" and "middle" in text) for word in words)
        assert ("background" in said) == ("background" in text or "backdrop" in text)
        assert ("size" in said) == ("small" in text or "large" in text)
        assert "place" in said or "|" not in said["object"]
    for attribute in ("background", "size"):
        assert 0.65 < sum(attribute in said for _, said in captions) / len(captions) < 0.85


def test_captions_write_an_before_a_vowel() -> None:
    texts = [describe(Scene((Thing("owl", "small", "left"),), "blue"), random.Random(i)).text for i in range(40)]
    assert any("an owl" in text for text in texts) and not any("a owl" in text for text in texts)


def test_held_out_captions_are_told_by_their_text_alone() -> None:
    rng = random.Random(0)
    for held_out in (True, False):
        assert all(is_held_out(random_caption(rng, held_out=held_out)[1].text) is held_out for _ in range(30))
    texts = {describe(scene, rng).text for scene in some(2000)}
    assert 0.03 < sum(map(is_held_out, texts)) / len(texts) < 0.07


def test_every_object_has_a_sprite_of_its_own() -> None:
    sprites = load_sprites()
    assert len(sprites) == len(OBJECT_NAMES) and (sprites[:, 3].mean((1, 2)) > 0.1).all()
    distance = torch.cdist(sprites.flatten(1)[None], sprites.flatten(1)[None])[0]
    assert distance.fill_diagonal_(torch.inf).min() > 5
