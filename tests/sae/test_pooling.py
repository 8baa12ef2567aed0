"""Pooled codes against codes in one piece, on a GPU where there is one and in Triton's interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluxsae.sae import L1, SAE, BatchTopK, Gated, JumpReLU, ThresholdForm, TopK
from fluxsae.sae import pooling as pooled_codes
from fluxsae.sae.pooling import PlainPooling, ThresholdPooling, TopKPooling, pooling_of
from tests.synthetic import randomised

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(kind: type[SAE], d_in: int, n_features: int) -> SAE:
    sae = kind(d_in, n_features, **({"k": 3} if kind in (TopK, BatchTopK) else {}), seed=0)  # type: ignore[arg-type]
    if isinstance(sae, BatchTopK):
        sae.threshold.fill_(0.4)
    if isinstance(sae, JumpReLU):
        torch.nn.init.normal_(sae.log_threshold, -1.0, 0.5, generator=torch.Generator().manual_seed(1))
    if isinstance(sae, Gated):
        torch.nn.init.normal_(sae.log_gain, 0.0, 0.5, generator=torch.Generator().manual_seed(2))
        torch.nn.init.normal_(sae.b_mag, 0.0, 0.5, generator=torch.Generator().manual_seed(3))
    return randomised(sae).to(DEVICE)


def form_of(sae: SAE) -> ThresholdForm:
    form = sae.threshold_form()
    assert form is not None
    return form


def draw(n_images: int, n_tokens: int, d_in: int) -> Tensor:
    generator = torch.Generator().manual_seed(n_tokens)
    return torch.randn(n_images, n_tokens, d_in, generator=generator).to(DEVICE)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a few tokens already cross every boundary."""
    kernels = pytest.importorskip("fluxsae.kernels.pooling", exc_type=ImportError)
    for name, size in (("FEATURES", 16), ("TOKENS", 16), ("DEPTH", 16), ("_TOGETHER", 2), ("_BLOCK", 32)):
        monkeypatch.setattr(kernels, name, size)


@pytest.mark.parametrize("part", [3, 12, 10_000])
@pytest.mark.parametrize("kind", [L1, TopK, BatchTopK, JumpReLU, Gated])
def test_parts_do_not_matter(kind: type[SAE], part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooled_codes, "PART", part)
    sae, tokens = make(kind, 8, 20), draw(5, 7, 8)
    codes = sae.encode(tokens).detach()
    scores, fired = PlainPooling(sae).pool(tokens)
    assert torch.allclose(scores, codes.amax(dim=1), atol=1e-6)
    assert torch.equal(fired.long(), (codes > 0).sum(dim=1)) and 0 < int(fired.sum()) < fired.numel() * 7
    chosen = PlainPooling(sae).codes(tokens[1], torch.tensor([3, 0, 19], device=DEVICE))
    assert torch.allclose(chosen, codes[1][:, [3, 0, 19]], atol=1e-6)


@pytest.mark.parametrize("kind", [L1, TopK, BatchTopK, JumpReLU, Gated])
def test_nan_is_no_score(kind: type[SAE]) -> None:
    """Scoring stops at one that is not finite: NaN must not pass for a feature that has no code."""
    sae, tokens = make(kind, 8, 20), draw(3, 7, 8)
    tokens[1, 4, 2] = torch.nan
    scores, _ = PlainPooling(sae).pool(tokens)
    assert bool(scores[1].isnan().any()) and not bool(scores[[0, 2]].isnan().any())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", [L1, BatchTopK, Gated])
def test_thresholds_inside_the_product(kind: type[SAE]) -> None:
    sae = make(kind, 16, 17)
    compare(ThresholdPooling(sae, form_of(sae), torch.float32), sae, draw(1, 17, 16))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("n_images", "n_tokens", "d_in", "n_features"), [(1, 1, 16, 16), (3, 18, 24, 19), (2, 16, 7, 1)]
)
def test_tiles_of_awkward_sizes(n_images: int, n_tokens: int, d_in: int, n_features: int) -> None:
    sae = make(JumpReLU, d_in, n_features)
    compare(ThresholdPooling(sae, form_of(sae), torch.float32), sae, draw(n_images, n_tokens, d_in))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("part", [5, 10_000])
@pytest.mark.parametrize(("n_images", "n_tokens", "n_features"), [(1, 1, 16), (3, 6, 17)])
def test_chosen_codes(
    n_images: int, n_tokens: int, n_features: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooled_codes, "PART", part)
    sae, tokens = make(TopK, 12, n_features), draw(n_images, n_tokens, 12)
    assert isinstance(sae, TopK)
    compare(TopKPooling(sae, sae.k, torch.float32), sae, tokens)


def compare(ours: ThresholdPooling | TopKPooling, sae: SAE, tokens: Tensor) -> None:
    """`ours` pools as the reference does, and its codes are those that it pools."""
    expected, found = PlainPooling(sae).pool(tokens), ours.pool(tokens)
    assert torch.allclose(found.scores, expected.scores, atol=2e-5)
    assert torch.equal(found.fired, expected.fired)
    features = torch.arange(sae.n_features, device=DEVICE).flip(0)
    codes = ours.codes(tokens[-1], features)
    assert torch.allclose(codes.amax(dim=0), found.scores[-1, features], atol=2e-5)
    assert torch.equal((codes > 0).sum(dim=0), found.fired[-1, features].long())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", [L1, TopK, JumpReLU, Gated])
def test_a_token_that_is_no_number_shows(kind: type[SAE]) -> None:
    sae, tokens = make(kind, 8, 9), draw(3, 5, 8)
    tokens[1, 4, 2] = torch.nan
    ours = (
        TopKPooling(sae, sae.k, torch.float32)
        if isinstance(sae, TopK)
        else ThresholdPooling(sae, form_of(sae), torch.float32)
    )
    assert ours.pool(tokens).scores.isfinite().all(dim=1).tolist() == [True, False, True]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_weights_keep_the_mean_out(dtype: torch.dtype) -> None:
    """Tokens far from 0, as FLUX has them: the mean's own products are a thousand times the codes."""
    sae = make(L1, 32, 16)
    sae.mean.mul_(1000.0)
    tokens = (draw(2, 10, 32) + sae.mean).bfloat16()
    ours = ThresholdPooling(sae, form_of(sae))
    ours.weight = ours.weight.float()  # still rounded; the interpreter does not multiply bf16
    found = ours.pool(tokens.to(dtype)).scores  # bf16 is another dtype than the weights' now
    exact = PlainPooling(sae.double()).pool(tokens.double()).scores
    assert (found - exact).abs().max() < 0.01 * exact.max()


def test_who_pools() -> None:
    sae = make(L1, 8, 20)
    assert isinstance(pooling_of(sae, "32-true"), PlainPooling)
    assert isinstance(pooling_of(sae, "bf16-mixed"), ThresholdPooling if DEVICE == "cuda" else PlainPooling)
