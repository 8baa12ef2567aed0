"""Pipelines of which a part stays in host memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fluxsae.models.load import load_pipeline
from fluxsae.models.offload import Offloaded, spread
from fluxsae.models.placement import to_device

CPU = torch.device("cpu")


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("half-way")


@pytest.mark.parametrize("n", [1, 2, 5])
def test_two_blocks_at_most_are_on_the_device(n: int) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))
    x = torch.randn(4, 3)
    expected = model(x)
    blocks = [model[i] for i in spread(5, n)]
    offloaded, counts = Offloaded(blocks, CPU), []
    homes = [block.weight.data_ptr() for block in blocks]
    for block in blocks:
        block.register_forward_hook(lambda *_: counts.append(len(offloaded.on_device)))
    for _ in range(3):
        assert torch.equal(model(x), expected)
        assert max(counts) <= 2 and len(offloaded.on_device) == 1
        at_home = [block.weight.data_ptr() == home for block, home in zip(blocks, homes, strict=True)]
        assert at_home.count(False) == 1


def test_a_pass_that_ends_half_way_leaves_the_next_one_right() -> None:
    layers = [nn.Linear(3, 3) for _ in range(4)]
    x = torch.randn(4, 3)
    expected = nn.Sequential(*layers)(x)
    offloaded = Offloaded(layers, CPU)
    with pytest.raises(RuntimeError, match="half-way"):
        nn.Sequential(layers[0], layers[1], Failing())(x)
    assert torch.equal(nn.Sequential(*layers)(x), expected)
    assert len(offloaded.on_device) == 1


def test_the_chosen_blocks_are_spread() -> None:
    assert spread(38, 38) == list(range(38))
    assert spread(4, 2) == [1, 3] and spread(38, 1) == [19] and spread(38, 0) == []
    gaps = [b - a for a, b in zip(spread(38, 16), spread(38, 16)[1:], strict=False)]
    assert min(gaps) == 2 and max(gaps) == 3 and max(spread(38, 16)) < 38


def test_more_blocks_than_there_are(tiny_flux: Path) -> None:
    with pytest.raises(ValueError, match="offload_blocks is 3; this transformer has 2 single-stream blocks"):
        to_device(load_pipeline(tiny_flux), CPU, n_offloaded=3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_weights_arrive_before_they_are_used() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8)))
    x = torch.randn(64, 2048, device="cuda")
    with torch.no_grad():
        expected = model.to("cuda")(x)
        model.to("cpu")
        Offloaded(list(model), torch.device("cuda"))
        for _ in range(5):
            assert torch.equal(model(x), expected)
