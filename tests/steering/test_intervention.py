"""`intervene`: exact where it changes nothing, and the same for every image of a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from fluxsae.models.generation import generate
from fluxsae.models.recording import record
from fluxsae.sae.base import SAE
from fluxsae.sae.kinds.topk import TopK
from fluxsae.steering.intervention import intervene, random_twin, schedule_weight

SITE = "transformer_blocks.1.ff"
PROMPTS = ["a fox", "a red apple on the left", "a boat"]
SITES = (
    SITE,
    "transformer_blocks.0",
    "transformer_blocks.1.attn",
    "single_transformer_blocks.1",
    "transformer_blocks.0:text",
)


@pytest.fixture(scope="module")
def sae() -> SAE:
    torch.manual_seed(0)
    sae = TopK(32, 24, 5)
    sae.mean_norm = 3.0
    sae.mean.normal_()
    sae.scale.fill_(0.7)
    return sae.eval()


def sample(pipe: FluxPipeline, prompts: list[str] = PROMPTS) -> Tensor:
    seeds = list(range(len(prompts)))
    return generate(
        pipe, prompts, seeds, height=64, width=32, n_steps=3, guidance=3.5, text_length=16, images=False
    ).latents


def tokens(pipe: FluxPipeline, site: str = SITE, step: int = 1, **edits: object) -> tuple[Tensor, Tensor]:
    """The tokens at a site before and after the edit there."""
    with (
        record(pipe, [site], [step]) as before,
        intervene(pipe, site=site, **edits),
        record(pipe, [site], [step]) as after,
    ):  # type: ignore[arg-type]
        sample(pipe)
    return before[site, step], after[site, step]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(
    "edits", [{}, {"add": {3: 0.0}}, {"scale": {3: 1.0, 4: 1}}, {"add": {1: 0.0}, "scale": {2: 1.0}}, {"steps": []}]
)
def test_an_edit_that_changes_nothing_leaves_the_image_equal_to_the_bit(
    tiny_pipe: FluxPipeline, sae: SAE, site: str, edits: dict[str, object]
) -> None:
    plain = sample(tiny_pipe)
    with intervene(tiny_pipe, sae, site=site, **edits):  # type: ignore[arg-type]
        assert torch.equal(sample(tiny_pipe), plain)


def test_no_step_of_the_window_leaves_the_image_equal_to_the_bit(tiny_pipe: FluxPipeline, sae: SAE) -> None:
    plain = sample(tiny_pipe)
    with intervene(tiny_pipe, sae, site=SITE, add={3: 5.0}, steps=[]):
        assert torch.equal(sample(tiny_pipe), plain)
    with intervene(tiny_pipe, sae, site=SITE, add={3: 5.0}, mask=torch.zeros(4, 2)):
        assert torch.equal(sample(tiny_pipe), plain)


def test_hooks_are_gone_afterwards_also_after_an_error(tiny_pipe: FluxPipeline, sae: SAE) -> None:
    plain = sample(tiny_pipe)
    with pytest.raises(RuntimeError), intervene(tiny_pipe, sae, site=SITE, add={3: 9.0}):
        raise RuntimeError
    assert torch.equal(sample(tiny_pipe), plain)


@pytest.mark.parametrize("site", SITES)
def test_every_image_of_a_batch_is_edited_as_it_would_be_alone(tiny_pipe: FluxPipeline, sae: SAE, site: str) -> None:
    edits: dict[str, dict[int, float]] = {"add": {3: 2.0}, "scale": {5: 3.0}, "clamp": {7: 2.0}}
    plain = sample(tiny_pipe)
    with intervene(tiny_pipe, sae, site=site, **edits):  # type: ignore[arg-type]
        together = sample(tiny_pipe)
        alone = sample(tiny_pipe, PROMPTS[:1])
    changed = (together - plain).abs().amax(dim=(1, 2))
    assert (changed > 1e-3).all()
    torch.testing.assert_close(together[:1], alone, atol=1e-3, rtol=1e-3)


def test_adding_moves_every_token_along_the_direction_by_strength_times_mean_norm(
    tiny_pipe: FluxPipeline, sae: SAE
) -> None:
    before, after = tokens(tiny_pipe, sae=sae, add={3: 2.0, 4: -1.0})
    expected = 3.0 * (2.0 * sae.directions[3] - sae.directions[4])
    torch.testing.assert_close(after - before, expected.expand_as(before), atol=1e-5, rtol=1e-4)


def test_a_direction_needs_no_sae(tiny_pipe: FluxPipeline) -> None:
    direction = torch.arange(32.0)
    before, after = tokens(tiny_pipe, direction=direction, strength=0.5, mean_norm=4.0)
    torch.testing.assert_close((after - before).norm(dim=2), torch.full(before.shape[:2], 2.0))


def test_changing_codes_preserves_what_the_sae_does_not_explain(tiny_pipe: FluxPipeline, sae: SAE) -> None:
    before, after = tokens(tiny_pipe, sae=sae, scale={2: 3.0}, ablate=[6], clamp={9: 1.5})
    codes = sae.encode(before)
    wanted = codes.clone()
    wanted[..., 2] *= 3
    wanted[..., 6] = 0
    wanted[..., 9] = 1.5
    unexplained = before - sae.decode(codes)
    torch.testing.assert_close(after, sae.decode(wanted) + unexplained, atol=1e-4, rtol=1e-4)


def test_a_mask_edits_its_tokens_only(tiny_pipe: FluxPipeline, sae: SAE) -> None:
    mask = torch.zeros(4, 2)
    mask[1, 0], mask[3, 1] = 1.0, 0.5
    before, after = tokens(tiny_pipe, step=0, sae=sae, add={3: 2.0}, mask=mask)
    moved = (after - before).norm(dim=2)
    torch.testing.assert_close(moved, (6.0 * mask.flatten()).expand_as(moved), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_schedule_runs_over_the_window(tiny_pipe: FluxPipeline, sae: SAE, schedule: str) -> None:
    steps = [0, 1, 2]
    with (
        record(tiny_pipe, [SITE], steps) as before,
        intervene(tiny_pipe, sae, site=SITE, add={3: 1.0}, steps=[1, 2], schedule=schedule),  # type: ignore[arg-type]
        record(tiny_pipe, [SITE], steps) as after,
    ):
        sample(tiny_pipe)
    moved = [float((after[SITE, s] - before[SITE, s]).norm(dim=2).mean()) for s in steps]
    weights = [0.0, 1.0, schedule_weight(schedule, 1, 2)]  # type: ignore[arg-type]
    np.testing.assert_allclose(moved, [3.0 * weight for weight in weights], atol=1e-4)


def test_a_text_stream_is_edited_alone(tiny_pipe: FluxPipeline, sae: SAE) -> None:
    site = "single_transformer_blocks.1:text"
    with (
        record(tiny_pipe, [site, "single_transformer_blocks.1"], [0]) as before,
        intervene(tiny_pipe, sae, site=site, add={3: 1.0}),
        record(tiny_pipe, [site, "single_transformer_blocks.1"], [0]) as after,
    ):
        sample(tiny_pipe)
    assert not torch.equal(before[site, 0], after[site, 0])
    image = "single_transformer_blocks.1"
    assert torch.equal(before[image, 0], after[image, 0])


def test_a_random_twin_reads_the_same_codes_and_moves_as_far(sae: SAE) -> None:
    twin = random_twin(sae, [4], seed=1)
    x = torch.randn(3, 5, 32)
    assert torch.equal(twin.encode(x), sae.encode(x))
    torch.testing.assert_close(twin.W_dec.norm(dim=1), sae.W_dec.norm(dim=1))
    assert abs(float(twin.directions[4] @ sae.directions[4])) < 0.9
    assert torch.equal(twin.W_dec, random_twin(sae, [4], seed=1).W_dec)


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ({"add": {24: 1.0}}, "feature 24 is not in this SAE, which has features 0 to 23"),
        ({"scale": {2: 2.0}, "ablate": [2]}, "changed twice"),
        ({"add": {2: 1.0}, "steps": range(4)}, "step 3 is beyond the schedule"),
        ({"add": {2: 1.0}, "steps": [-1]}, "step -1 is negative"),
        ({"add": {2: 1.0}, "mask": [1.0, 0.0]}, "the mask has 2 tokens but an image has 8"),
        ({"add": {2: 1.0}, "site": "transformer_blocks.7.ff"}, "is no module of this transformer"),
        ({"add": {2: 1.0}, "site": "transformer_blocks.1.ff.net.0.proj"}, "width 32 but the site's are 128"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_pipe: FluxPipeline, sae: SAE, edits: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said), intervene(tiny_pipe, sae, **{"site": SITE, **edits}):  # type: ignore[arg-type]
        sample(tiny_pipe)


def test_an_sae_that_names_no_site_or_norm_says_so(tiny_pipe: FluxPipeline) -> None:
    seed = TopK(32, 24, 5)
    with pytest.raises(ValueError, match="names no site"), intervene(tiny_pipe, seed, add={1: 1.0}):
        pass
    with pytest.raises(ValueError, match="give mean_norm"), intervene(tiny_pipe, seed, add={1: 1.0}, site=SITE):
        pass
