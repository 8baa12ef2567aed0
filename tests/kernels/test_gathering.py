"""Gathering fp8 tokens and decoding them at once, on a GPU where there is one and in Triton's interpreter elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fluxsae.data.mixing.tokens import MixedTokens
from fluxsae.shards.encoding import decode_fp8
from tests.synthetic import token_shards

kernels = pytest.importorskip("fluxsae.kernels.gathering", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("width", [256, 250, 16])
@pytest.mark.parametrize("block", [64, 4096])
def test_every_code_and_scale(width: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", block)
    every = torch.arange(256, dtype=torch.uint8)
    codes = torch.stack([every.roll(i)[:width] for i in range(0, 256, 8)]).view(torch.float8_e4m3fn)
    scale = torch.exp2(torch.arange(32, dtype=torch.float32) * 7 - 100)  # at 2**117 some overflow
    index = torch.randperm(32, generator=torch.Generator().manual_seed(0))[:20].repeat(2)
    found = kernels.gather_decoded(codes.to(DEVICE), scale.to(DEVICE), index.to(DEVICE)).cpu()
    expected = (codes.float() * scale[:, None]).to(torch.bfloat16)[index]
    assert torch.equal(found.isnan(), expected.isnan()) and bool(expected.isnan().any())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert torch.equal(found.nan_to_num(), decode_fp8(codes, scale)[index].nan_to_num())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter rounds to bf16 in another way")
def test_scales_that_are_no_powers_of_two() -> None:
    generator = torch.Generator().manual_seed(0)
    codes, scale = torch.randn(9, 32, generator=generator).to(torch.float8_e4m3fn), torch.rand(9, generator=generator)
    index = torch.tensor([8, 0, 3])
    found = kernels.gather_decoded(codes.to(DEVICE), scale.to(DEVICE), index.to(DEVICE)).cpu()
    assert torch.equal(found, (codes.float() * scale[:, None]).to(torch.bfloat16)[index])


def test_nothing_is_nothing() -> None:
    codes, none = torch.zeros(3, 8, device=DEVICE).to(torch.float8_e4m3fn), torch.empty(0, dtype=torch.int64)
    assert kernels.gather_decoded(codes, torch.ones(3, device=DEVICE), none.to(DEVICE)).shape == (0, 8)


def test_a_stream_that_decodes_gives_the_same_tokens(tmp_path: Path) -> None:
    shards = token_shards(tmp_path, 12, 2, storage="fp8")
    device = torch.device(DEVICE)
    plain, decoding = (MixedTokens(shards, range(24), batch_size=40, buffer_images=5, device=device) for _ in range(2))
    plain.mixing._decodes, decoding.mixing._decodes = False, True  # type: ignore[union-attr]
    for one, other in zip(plain, decoding, strict=True):
        assert one.scale is not None and other.scale is None
        assert torch.equal(one.decoded(), other.decoded())
