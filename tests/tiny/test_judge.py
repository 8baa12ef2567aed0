"""The judge reads hand-made pictures as they are, and rendered scenes right 98 times in 100 or more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import judge as judging
from benchmarks.judge import (
    Verdict,
    background_colour,
    background_of,
    foreground,
    judge,
    keep_half,
    load_zero_shot,
    place_of,
    size_of,
    with_article,
)
from benchmarks.tiny_flux import Measure, check_judge, draw_scenes, measure_generated, psnr, share
from scripts.tiny.scenes import (
    BACKGROUND_NAMES,
    OBJECT_NAMES,
    PLACE_NAMES,
    SIDE,
    SIZE_NAMES,
    is_held_out,
    render,
    to_tensors,
)
from scripts.tiny.vocabulary import BACKGROUNDS, PLACES, SIZES
from tests.tiny.test_scenes import some

CLIP = Path("checkpoints/tiny-clip")


def picture(background: str, *squares: tuple[str, float, tuple[float, float, float]]) -> Tensor:
    """A picture [3, S, S] of coloured squares, each of a place, a side and a colour."""
    image = (torch.tensor(BACKGROUNDS[background]) / 255)[:, None, None].repeat(1, SIDE, SIDE)
    for place, side, colour in squares:
        x, y = (round((c - side / 2) * SIDE) for c in PLACES[place])
        image[:, y : y + round(side * SIDE), x : x + round(side * SIDE)] = torch.tensor(colour)[:, None, None]
    return image


LIME = (0.2, 1.0, 0.1)


@pytest.mark.parametrize("size", SIZE_NAMES)
@pytest.mark.parametrize("place", PLACE_NAMES)
def test_a_square_is_seen_where_and_as_large_as_it_is(place: str, size: str) -> None:
    masks = foreground(picture("blue", (place, SIZES[size], LIME))[None])
    assert masks.sum().item() == pytest.approx((SIZES[size] * SIDE) ** 2, rel=0.1)
    assert PLACE_NAMES[place_of(masks)] == place and SIZE_NAMES[size_of(masks)] == size


def test_every_background_is_told_with_noise_and_an_object_upon_it() -> None:
    pictures = torch.stack([picture(name, ("left", 0.5, LIME)) for name in BACKGROUND_NAMES])
    noise = 0.03 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    assert background_of(background_colour(pictures + noise)).tolist() == list(range(len(BACKGROUND_NAMES)))
    assert not foreground(pictures + noise)[:, :, SIDE * 3 // 5 :].any()  # the noise is no foreground


def test_a_plain_picture_has_no_place_and_no_size() -> None:
    masks = foreground(picture("red")[None])
    assert not masks.any() and place_of(masks).item() == size_of(masks).item() == -1


def test_foreground_covers_what_the_renderer_drew() -> None:
    images, masks = render(to_tensors(some(50)), torch.Generator().manual_seed(0))
    seen, drawn = foreground(images), masks.amax(1) > 0.5
    overlap = (seen & drawn).sum((1, 2)) / (seen | drawn).sum((1, 2))
    assert overlap.median() > 0.85 and not (seen & (masks.amax(1) == 0)).float().mean() > 0.005


@pytest.mark.parametrize(("place", "other"), [("left", "right"), ("right", "left"), ("top", "bottom")])
def test_half_a_picture_of_two_is_a_picture_of_one(place: str, other: str) -> None:
    both = picture("pink", (place, 0.28, LIME), (other, 0.28, (0.0, 0.0, 0.0)))
    half = keep_half(both, place, background_colour(both[None])[0])
    assert torch.equal(half, picture("pink", (place, 0.28, LIME)))


def test_the_centre_is_no_half() -> None:
    with pytest.raises(ValueError, match="'center' is in no half"):
        keep_half(picture("pink"), "center", torch.zeros(3))


def verdict_on(said: dict[str, str], seen: list[str], monkeypatch: pytest.MonkeyPatch, *places: str) -> Verdict:
    """The verdict when CLIP sees the objects `seen`, part by part, in blue at `places`."""
    monkeypatch.setattr(judging, "object_of", lambda *_: torch.tensor([OBJECT_NAMES.index(name) for name in seen]))
    return judge(picture("blue", *((p, 0.28, LIME) for p in places))[None], [said], None)[0]  # type: ignore[arg-type]


def test_only_what_is_said_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    found, right = verdict_on({"object": "fox", "background": "red"}, ["fox"], monkeypatch, "top")
    assert right == {"object": True, "background": False}
    assert found == {"object": "fox", "background": "blue", "place": "top", "size": "small"}


def test_both_objects_must_be_right_each_at_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"object": "fox|owl", "place": "right|left", "size": "small|large"}
    found, right = verdict_on(said, ["fox", "owl"], monkeypatch, "left", "right")
    assert right == {"object": True, "place": True, "size": False} and found["place"] == "right|left"
    assert verdict_on(said, ["fox", "cat"], monkeypatch, "left", "right").right["object"] is False
    swapped = verdict_on(said, ["owl", "fox"], monkeypatch, "left", "right").right
    assert not swapped["object"] and not swapped["place"]
    missing = verdict_on(said, ["fox", "owl"], monkeypatch, "right")
    assert missing.found["place"] == "right|" and not missing.right["place"]


def test_an_before_a_vowel() -> None:
    assert with_article("a picture of a owl", "owl") == "a picture of an owl"
    assert with_article("a picture of a fox", "fox") == "a picture of a fox"


def test_shares_count_captions_that_say_the_attribute() -> None:
    one = Verdict({"object": "fox"}, {"object": True, "background": True})
    two = Verdict({"object": "fox|owl"}, {"object": False})
    values = {m.name: (m.value, m.n) for m in measure_generated([one, one, two])}
    assert values["generated: background"] == (100, 2)
    assert values["generated: object, one"] == (100, 2)
    assert values["generated: both objects, two"] == (0, 1)
    assert not share("place", [one], "place", 95).reached  # said by none: nothing was shown


def test_a_measure_knows_its_bounds() -> None:
    assert Measure("a", 30, "dB", 1, at_least=30).reached and not Measure("a", 41, "MB", 1, at_most=40).reached
    assert Measure("a", 0.1, "s", 1).reached and Measure("a", 41, "MB", 1, at_most=40).wanted == "≤ 40 MB"


def test_psnr_of_a_known_error() -> None:
    assert psnr(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.1)) == pytest.approx(20, abs=1e-4)


def test_scenes_to_judge_are_held_out_8_bit_and_the_same_every_time() -> None:
    scenes, again = draw_scenes(5, 3), draw_scenes(5, 3)
    assert all(is_held_out(caption.text) for caption in scenes.captions)
    assert torch.equal(scenes.pictures, again.pictures) and scenes.truths == again.truths
    assert torch.allclose(scenes.pictures * 255, (scenes.pictures * 255).round(), atol=1e-4)
    for caption, everything in zip(scenes.captions, scenes.truths, strict=True):
        assert caption.attributes.items() <= everything.items()


@pytest.mark.slow
def test_the_judge_reads_rendered_scenes() -> None:
    measures = check_judge("rendered", draw_scenes(200, 11), load_zero_shot(CLIP), at_least=98.0)
    assert [m for m in measures if not m.reached] == [] and len(measures) == 6
