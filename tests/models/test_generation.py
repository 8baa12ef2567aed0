"""Images that do not depend on their batch."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline

from fluxsae.models.generation import Generated, generate, initial_noise, time_shift
from fluxsae.records.spec import token_grid


def make(pipe: FluxPipeline, prompts: list[str], seeds: list[int], **changes: object) -> Generated:
    options = {"height": 32, "width": 64, "n_steps": 3, "guidance": 3.5, "text_length": 16, **changes}
    return generate(pipe, prompts, seeds, **options)  # type: ignore[arg-type]


def test_noise_is_the_same_in_any_batch() -> None:
    together = initial_noise([5, 6, 7], 32, 64, 16)
    assert together.shape == (3, token_grid(32, 64).n_tokens, 64)
    for i, seed in enumerate([5, 6, 7]):
        assert torch.equal(initial_noise([seed], 32, 64, 16)[0], together[i])
    assert not torch.equal(together[0], together[1])


def test_noise_is_what_the_pipeline_draws_of_the_same_generator(tiny_pipe: FluxPipeline) -> None:
    theirs = tiny_pipe(
        "a fox",
        generator=torch.Generator().manual_seed(9),
        height=32,
        width=64,
        num_inference_steps=3,
        max_sequence_length=16,
    ).images[0]
    ours = make(tiny_pipe, ["a fox"], [9]).images
    assert ours is not None and ours[0].tobytes() == theirs.tobytes()


def test_an_image_does_not_depend_on_its_batch(tiny_pipe: FluxPipeline) -> None:
    prompts, seeds = ["a fox", "an owl with a very long tail", "a fox"], [1, 2, 3]
    together = make(tiny_pipe, prompts, seeds)
    for i in range(3):
        alone = make(tiny_pipe, prompts[i : i + 1], seeds[i : i + 1])
        assert torch.equal(alone.latents[0], together.latents[i])
        assert alone.pixels is not None and together.pixels is not None
        assert torch.equal(alone.pixels[0], together.pixels[i])


def test_stopping_early_leaves_the_latents_of_that_step(tiny_pipe: FluxPipeline) -> None:
    passes: list[int] = []
    handle = tiny_pipe.transformer.register_forward_hook(lambda *_: passes.append(1))
    stopped = make(tiny_pipe, ["a fox"], [1], images=False, last_step=1)
    handle.remove()
    assert len(passes) == 2 and stopped.images is None
    finished = make(tiny_pipe, ["a fox"], [1])
    assert finished.images is not None and not torch.equal(finished.latents, stopped.latents)
    assert torch.equal(make(tiny_pipe, ["a fox"], [1], images=False, last_step=2).latents, finished.latents)


def test_wrong_calls_are_refused(tiny_pipe: FluxPipeline) -> None:
    with pytest.raises(ValueError, match="width 60 is not a positive multiple of 16"):
        make(tiny_pipe, ["a"], [1], width=60)
    with pytest.raises(ValueError, match="step 3 is beyond the schedule"):
        make(tiny_pipe, ["a"], [1], images=False, last_step=3)
    with pytest.raises(ValueError, match="an image needs all 3 steps"):
        make(tiny_pipe, ["a"], [1], last_step=1)
    with pytest.raises(ValueError, match="there are 2 prompts but 1 seeds"):
        make(tiny_pipe, ["a", "b"], [1])


@pytest.mark.parametrize("size", [32, 256])
def test_the_time_shift_is_the_one_in_force(tiny_pipe: FluxPipeline, size: int) -> None:
    make(tiny_pipe, ["a fox"], [1], height=size, width=size, images=False, last_step=0)
    shift = time_shift(tiny_pipe.scheduler, token_grid(size, size).n_tokens)
    sigmas = torch.linspace(1, 1 / 3, 3)
    torch.testing.assert_close(tiny_pipe.scheduler.sigmas[:-1], shift * sigmas / (1 + (shift - 1) * sigmas))
