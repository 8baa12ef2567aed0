"""Matrix products that do not depend on their batch, and a sampler that waits for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fluxsae.models.batch_invariant import BatchInvariantLinear
from fluxsae.models.generation import generate


@pytest.mark.parametrize("shape", [(5, 192), (5, 7, 192), (3, 192), (1, 192)])
def test_five_images_are_computed_one_by_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(1152, 192), torch.randn(1152)
    with BatchInvariantLinear(5):
        found = functional.linear(x, weight, bias)
    one_by_one = torch.cat([functional.linear(one, weight, bias) for one in x.split(1)])
    assert torch.equal(found, one_by_one if len(x) == 5 else functional.linear(x, weight, bias))


class Reads(TorchDispatchMode):
    """Counts values that the host reads, each of which would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.n_read = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n_read += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


def test_sampling_and_decoding_read_no_value(tiny_pipe: FluxPipeline) -> None:
    with Reads() as reads:
        torch.ones(1).item()
        assert reads.n_read == 1
        generate(tiny_pipe, ["a fox"], [1], height=32, width=32, n_steps=3, guidance=3.5, text_length=16)
    assert reads.n_read == 1
