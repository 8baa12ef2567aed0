"""The hand-made training step against autograd's, on a GPU where there is one and in Triton's interpreter elsewhere."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fluxsae.kernels import columns, selection
from fluxsae.kernels.fp8 import straight_through
from fluxsae.sae import L1, SAE, TopK
from fluxsae.sae.dead import aux_error
from fluxsae.sae.objective import squared_errors, token_weights
from fluxsae.training.steps.fused import auxiliary
from fluxsae.training.steps.fused import step as fused_step
from fluxsae.training.steps.fused.kernels import decoding, feature_lists, row_updates, scalars
from fluxsae.training.steps.fused.settings import Settings
from fluxsae.training.steps.fused.step import FusedStep
from tests.synthetic import randomised

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a few tokens already cross every boundary."""
    for module in (feature_lists, row_updates):
        monkeypatch.setattr(module, "PIECE", 4)
    for module in (decoding, row_updates):
        monkeypatch.setattr(module, "TILE", 16)
    monkeypatch.setattr(auxiliary, "_BUCKET", 4)
    monkeypatch.setattr(fused_step, "SPARSE_UP_TO", 8)


def chosen(pre: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values = torch.full((len(pre), k), torch.nan, device=DEVICE)
    indices = torch.full((len(pre), k), -1, device=DEVICE, dtype=torch.int32)
    selection.select(pre, bias, values, indices)
    return values, indices.long()


def rows_to_choose_from(n_features: int, dtype: torch.dtype) -> Tensor:
    """Ordinary, without a positive, all alike, with many ties, with few positives."""
    pre = torch.randn(5, n_features, generator=torch.Generator().manual_seed(n_features))
    pre[1] = -pre[1].abs()
    pre[2] = 1.0
    pre[3] = pre[3].round()
    pre[4] = torch.where(torch.arange(n_features) < 2, 0.5, -1.0)
    return pre.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_features", "k"), [(64, 4), (33, 33), (1000, 1), (100, 7), (1030, 40)])
def test_select_finds_the_k_largest(n_features: int, k: int, dtype: torch.dtype) -> None:
    pre = rows_to_choose_from(n_features, dtype)
    values, indices = chosen(pre, torch.zeros(n_features, device=DEVICE), k)
    expected = pre.float().sort(dim=1, descending=True).values[:, :k].relu()
    assert torch.equal(values.sort(dim=1, descending=True).values, expected)
    assert torch.equal(torch.where(values > 0, pre.float().gather(1, indices), 0.0), values)
    for row, index in zip(values, indices, strict=True):
        assert len(set(index[row > 0].tolist())) == int((row > 0).sum())


def test_select_adds_the_bias() -> None:
    pre, bias = torch.zeros(1, 40, device=DEVICE), torch.arange(40.0, device=DEVICE)
    assert chosen(pre, bias, 3)[1].sort().values.tolist() == [[37, 38, 39]]


def test_select_counts_nan_as_largest() -> None:
    pre = torch.ones(1, 40, device=DEVICE)
    pre[0, 7] = -torch.nan
    values, indices = chosen(pre, torch.zeros(40, device=DEVICE), 2)
    assert int(values.isnan().sum()) == 1 and int(indices[values.isnan()]) == 7


@pytest.mark.parametrize("widest", [32768, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_select_survives_more_ties_than_it_has_room_for(
    dtype: torch.dtype, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In some rows among others, more of them than programs look at."""
    monkeypatch.setattr(selection, "_WIDEST", widest)
    monkeypatch.setattr(selection, "_CHUNK", 256)
    monkeypatch.setattr(selection, "_AGAIN", 2)
    pre = torch.ones(6, 600, device=DEVICE, dtype=dtype)
    pre[1, 77] = 2.0
    pre[3] = torch.arange(600, device=DEVICE) / 8
    values, indices = chosen(pre, torch.zeros(600, device=DEVICE), 3)
    expected = [[1.0, 1.0, 1.0]] * 6
    expected[1], expected[3] = [1.0, 1.0, 2.0], pre[3, -3:].float().tolist()
    assert values.sort().values.tolist() == expected and 77 in indices[1].tolist()
    assert all(len(set(row)) == 3 for row in indices.tolist())


@pytest.mark.parametrize("widest", [32768, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_features", "k"), [(64, 4), (33, 33), (100, 70)])
def test_keep_largest_is_select_in_place(
    n_features: int, k: int, dtype: torch.dtype, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_WIDEST", widest)
    pre = rows_to_choose_from(n_features, dtype)
    codes = torch.full_like(pre, torch.nan)
    selection.keep_largest(pre, codes, k)
    values, _ = chosen(pre, torch.zeros(n_features, device=DEVICE), k)
    assert torch.equal(codes.float().sort(dim=1, descending=True).values[:, :k], values.sort(descending=True).values)
    assert bool(((codes == pre) | (codes == 0)).all()) and int((codes > 0).sum(dim=1).max()) <= k


@pytest.mark.parametrize("n_features", [2000, 2560])
@pytest.mark.parametrize("k", [1, 40, 700, 1999])
def test_of_many_equal_entries_the_first_are_kept(k: int, n_features: int) -> None:
    """Which, in bf16, cut a row in the middle of one of its parts; one of 2,560 lies in two blocks."""
    drawn = torch.randn(8, n_features, generator=torch.Generator().manual_seed(k))
    pre = (drawn * 4).round().div(4).bfloat16().to(DEVICE)
    codes = torch.full_like(pre, torch.nan)
    selection.keep_largest(pre, codes, k)
    order = pre.float().sort(dim=1, descending=True, stable=True).indices[:, :k]
    expected = torch.zeros_like(pre).scatter(1, order, pre.gather(1, order)).clamp_min(0)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize(
    ("n_features", "k"), [(8, 3), (64, 4), (328, 100), (1536, 200), (2000, 2000), (2056, 300), (2560, 700)]
)
def test_bits_say_which_codes_are_above_0(n_features: int, k: int) -> None:
    """For rows that are one block of a power of two, and two of them; and slopes are masked by bits as by codes."""
    pre = rows_to_choose_from(n_features, torch.bfloat16)
    codes, active = torch.empty_like(pre), torch.full((5, n_features // 8), 255, dtype=torch.uint8, device=DEVICE)
    assert selection.packs(n_features, pre.dtype)
    selection.keep_largest(pre, codes, k, active)
    without = torch.empty_like(pre)
    selection.keep_largest(pre, without, k)
    bits = (active[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=DEVICE)).flatten(1) & 1
    assert torch.equal(codes, without) and torch.equal(bits > 0, codes > 0)
    by_codes = torch.randn(5, n_features, generator=torch.Generator().manual_seed(k)).to(DEVICE, torch.bfloat16)
    by_bits = by_codes.clone()
    sums = columns.mask_slopes(codes, by_codes, torch.zeros((), device=DEVICE))
    assert torch.equal(columns.mask(active, by_bits)[0], sums[0]) and torch.equal(by_bits, by_codes)
    assert torch.allclose(columns.mask(active, by_bits)[1], sums[1])


@pytest.mark.parametrize("k", [1, 3, 64, 70, 96, 300])
def test_explain_gives_error_and_slopes(k: int) -> None:
    """Below and above the k from which on its loop stays one."""
    generator = torch.Generator(DEVICE).manual_seed(k)
    how: dict[str, Any] = {"generator": generator, "device": DEVICE}
    n, d_in, n_features = 5, 40, 400
    rows, x = (torch.randn(m, d_in, **how) for m in (n_features, n))
    values, scale = torch.rand(n, k, **how), torch.rand(n_features, **how)
    indices = torch.stack([torch.randperm(n_features, **how)[:k] for _ in range(n)]).int()
    error, slopes = torch.empty_like(x), x.new_empty(decoding.n_tiles(d_in), n, k)
    squares = x.new_empty(len(slopes), n)
    decoding.explain(values, indices, rows, scale, x, error, slopes, squares)
    chosen_rows = (rows * scale[:, None])[indices.long()]
    expected = torch.einsum("nk,nkd->nd", values, chosen_rows) - x
    assert torch.allclose(error, expected, atol=1e-4) and len(slopes) > 1
    assert torch.allclose(slopes.sum(0), torch.einsum("nkd,nd->nk", chosen_rows, expected), atol=1e-3)
    assert torch.allclose(squares.sum(0), expected.square().sum(1), rtol=1e-5)


def test_lists_hold_every_pair_once_in_order() -> None:
    n_tokens, n_features, k = 70, 12, 5
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(n_features, generator=generator)[:k] for _ in range(n_tokens)])
    indices[:, 0] = torch.where((indices == 3).any(dim=1), indices[:, 0], 3)  # a feature that always fires
    values = torch.rand(n_tokens, k, generator=generator) - 0.2
    slopes, weights = torch.randn(2, n_tokens, k, generator=generator), torch.rand(n_tokens, generator=generator)
    pairs = (values.to(DEVICE), indices.int().to(DEVICE))
    places = feature_lists.find_places(*pairs, n_features)
    lists = feature_lists.list_by_feature(*pairs, slopes.to(DEVICE), weights.to(DEVICE), places)
    expected = [
        (f, n, float(values[n, j]), float(slopes[:, n, j].sum() * weights[n]))
        for f in range(n_features)
        for n in range(n_tokens)
        for j in range(k)
        if indices[n, j] == f and values[n, j] > 0
    ]
    assert lists.counts.tolist() == [sum(row[0] == f for row in expected) for f in range(n_features)]
    assert lists.tokens[: len(expected)].tolist() == [row[1] for row in expected]
    assert lists.values[: len(expected)].tolist() == pytest.approx([row[2] for row in expected])
    assert lists.slopes[: len(expected)].tolist() == pytest.approx([row[3] for row in expected], abs=1e-6)
    pieces = [-(-int(count) // 4) - 1 for count in lists.counts]
    assert [f for f, n in enumerate(pieces) for _ in range(n)] == [f for f in lists.owners[: sum(pieces)].tolist()]


def test_weights_of_one_leave_rows_alone() -> None:
    rows = torch.randn(3, 20, device=DEVICE)
    expected = rows * torch.tensor([[1.0], [0.5], [1.0]], device=DEVICE)
    columns.weigh(rows, torch.tensor([1.0, 0.5, 1.0], device=DEVICE))
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("clip", [0.0, 1.2])
@pytest.mark.parametrize("n_tokens", [5, 37])
def test_tokens_are_weighed_by_the_objectives_rule(n_tokens: int, clip: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalars, "_CHUNK", 16)
    parts = torch.rand(3, n_tokens, generator=torch.Generator().manual_seed(0)).square().to(DEVICE)
    squares = parts.sum(dim=0)
    expected = token_weights(squares, clip)
    found = scalars.weigh_tokens(parts, clip, 7)
    assert torch.allclose(found.weights, expected) and (clip == 0) == bool((expected == 1).all())
    assert torch.allclose(found.loss, (squares * expected).mean() / 7) and torch.allclose(found.mse, squares.mean() / 7)


def test_processes_weigh_tokens_by_the_mean_length_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalars, "_CHUNK", 16)
    parts = torch.rand(3, 37, generator=torch.Generator().manual_seed(0)).square().to(DEVICE)
    expected = token_weights(parts.sum(dim=0), 1.2)
    mine, others = parts[:, :10].contiguous(), parts[:, 10:].contiguous()
    lengths = scalars.sum_lengths(mine) + scalars.sum_lengths(others)
    assert int(lengths[1]) == 37
    assert torch.allclose(scalars.weigh_tokens(mine, 1.2, 7, lengths).weights, expected[:10])


def test_a_token_that_is_not_finite_makes_the_loss_so() -> None:
    for bad in (torch.inf, torch.nan):
        squares = torch.ones(1, 9, device=DEVICE)
        squares[0, 4] = bad
        assert not scalars.weigh_tokens(squares, 10.0, 1).loss.isfinite()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99)])
def test_adams_factors(betas: tuple[float, float]) -> None:
    lr = torch.tensor(0.01, device=DEVICE)
    steps = [torch.tensor(float(n), device=DEVICE) for n in (0, 0, 0, 6)]
    updates = torch.tensor([0, -1], device=DEVICE)
    for t in (1, 2, 3):
        factors = scalars.adam_factors(torch.tensor(2.0, device=DEVICE), lr, steps, updates, betas, 0.25, 1e-8)
        expected = [0.01 / (1 - betas[0] ** t), (1 - betas[1] ** t) ** -0.5, 0.25, 1.0, 1e-8]
        assert factors.tolist() == pytest.approx(expected, rel=1e-6)
    for loss in (torch.inf, -torch.inf, torch.nan):
        assert scalars.adam_factors(torch.tensor(loss, device=DEVICE), lr, steps, updates, betas, 0.25, 1e-8)[3] == 0
    assert [int(step) for step in steps] == [3, 3, 3, 9] and updates.tolist() == [6, 3]


class Autograd(NamedTuple):
    """The step as autograd and torch's Adam make it."""

    sae: SAE
    optimizer: torch.optim.Adam
    settings: Settings

    def step(self, tokens: Tensor, dead: Tensor, penalty: float, lr: float) -> Tensor:
        sae, settings = self.sae, self.settings
        x = sae.normalise(tokens)
        run = sae.training_forward(x)
        squared = squared_errors(x, run)
        weights = token_weights(squared, settings.clip_tokens)
        loss = (weights * squared).mean()
        if isinstance(sae, L1):
            loss = loss + penalty * run.penalty / sae.l1
        if len(dead):
            error = (x - run.recon).detach()
            loss = loss + settings.aux_coef * aux_error(sae, x, error, dead, settings.aux_k, weights)
        loss = loss / sae.d_in
        self.optimizer.zero_grad()
        loss.backward()
        sae.remove_parallel_gradient()
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        sae.normalise_rows()
        return loss.detach()


def both(sae: SAE, settings: Settings) -> tuple[Autograd, FusedStep, torch.optim.Adam]:
    randomised(sae)
    with torch.no_grad():
        sae.normalise_rows()
    sae = sae.to(DEVICE)
    twin = copy.deepcopy(sae)
    plain = Autograd(twin, torch.optim.Adam(twin.parameters()), settings)
    return plain, FusedStep(sae, settings), torch.optim.Adam(sae.parameters(), fused=True)


def ramp(sae: SAE, penalty: float) -> float:
    """How much of its own penalty an SAE counts where that is to have the weight `penalty`."""
    form = sae.fused_form()
    assert form is not None
    return penalty / form.penalty if form.penalty else 1.0


def update(fused: FusedStep, optimizer: torch.optim.Adam, lr: float = 0.01) -> None:
    optimizer.param_groups[0]["lr"] = lr
    fused.update(optimizer)


@pytest.mark.parametrize(
    ("sae", "n_tokens"),
    [(TopK(20, 12, 3), 34), (L1(20, 24, 0.5), 24), (TopK(16, 24, 10), 18)],
    ids=["sparse", "L1", "dense TopK"],
)
def test_a_step_is_autograds(sae: SAE, n_tokens: int) -> None:
    """With features that fire on many tokens, clipped tokens, more dead features than aux_k, and a penalty."""
    settings = Settings(clip_tokens=1.5, aux_k=3, aux_coef=1 / 8, dtype=torch.float32)
    plain, fused, optimizer = both(sae, settings)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        tokens = 1 + 2 * torch.randn(n_tokens, sae.d_in, generator=generator).to(DEVICE)
        tokens[3] *= 30
        dead = torch.randperm(sae.n_features, generator=generator)[: (0, 2, 6)[step]].to(DEVICE)
        penalty = 0.3 * step if isinstance(sae, L1) else 0.0
        expected = plain.step(tokens, dead, penalty, 0.01)
        outcome = fused.forward(tokens, dead, ramp(sae, penalty))
        update(fused, optimizer)
        assert float(outcome.loss) == pytest.approx(float(expected), rel=1e-5)
    fused.synchronize_weights()
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(sae.n_features, device=DEVICE), atol=1e-6)
    for (name, ours), theirs in zip(sae.named_parameters(), plain.sae.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-4), name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(
                optimizer.state[ours][moment], plain.optimizer.state[theirs][moment], rtol=1e-3, atol=1e-5
            ), (name, moment)
    codes = sae.activate(sae.project(sae.normalise(tokens)))
    again = fused.forward(tokens, dead, ramp(sae, penalty))
    assert float(again.measure().l0) == pytest.approx(float((codes > 0).sum(dim=1).float().mean()))
    update(fused, optimizer)
    assert torch.equal(fused.fired().fired.float(), (codes > 0).sum(dim=0).float())


@pytest.mark.skipif(DEVICE == "cuda", reason="there, fp8 products with a bias are bf16")
@pytest.mark.parametrize(
    ("sae", "n_tokens"),
    [(TopK(32, 16, 3), 34), (L1(32, 32, 0.5), 24), (TopK(16, 32, 10), 18)],
    ids=["sparse", "L1", "dense TopK"],
)
def test_an_fp8_encoder_rounds_tokens_and_weights_and_nothing_else(sae: SAE, n_tokens: int) -> None:
    plain, fused, optimizer = both(sae, Settings(clip_tokens=1.5, dtype=torch.float32, fp8_encoder=True))
    generator, dead = torch.Generator().manual_seed(0), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for step in range(3):
        tokens = 1 + 2 * torch.randn(n_tokens - step, sae.d_in, generator=generator).to(DEVICE)
        outcome = fused.forward(tokens, dead, ramp(sae, 0.1))
        weights, x = fused.copies.enc_fp8, fused.passes.x_fp8
        assert weights is not None and x is not None
        smallest = 2**-9  # of e4m3
        assert torch.allclose(weights.decoded(), sae.W_enc, rtol=1 / 16, atol=smallest * float(weights.inverse))
        assert torch.allclose(
            x.part(len(tokens)).decoded(), fused.passes.x, rtol=1 / 16, atol=smallest * float(x.inverse)
        )
        rounded = (x.part(len(tokens)).decoded().clone(), weights.decoded().clone())
        plain.sae.project = partial(project_rounded, plain.sae, rounded)  # type: ignore[method-assign]
        expected = plain.step(tokens, dead, 0.1 * isinstance(sae, L1), 0.01)
        update(fused, optimizer)
        assert float(outcome.loss) == pytest.approx(float(expected), rel=1e-5)
    fused.synchronize_weights()
    for (name, ours), theirs in zip(sae.named_parameters(), plain.sae.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-4), name


def project_rounded(sae: SAE, rounded: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    return straight_through(x - sae.b_dec, sae.W_enc, *rounded) + sae.b_enc


def test_sizes_that_fp8_cannot_have_are_refused() -> None:
    with pytest.raises(ValueError, match="fp8_encoder is true, but fp8 wants sizes that 16 divides, not 20"):
        FusedStep(TopK(20, 16, 2), Settings(fp8_encoder=True))


@pytest.mark.parametrize("sae", [TopK(16, 8, 3), L1(16, 8, 0.5)])
def test_a_token_that_is_not_finite_changes_nothing(sae: SAE) -> None:
    _, fused, optimizer = both(sae, Settings(dtype=torch.float32))
    dead = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    tokens = torch.randn(9, 16, device=DEVICE)
    fused.forward(tokens, dead)
    update(fused, optimizer)
    fused.synchronize_weights()
    before = copy.deepcopy((sae.state_dict(), optimizer.state_dict()["state"]))
    tokens[5, 2] = torch.nan
    outcome = fused.forward(tokens, dead)
    update(fused, optimizer)
    fused.synchronize_weights()
    assert not bool(outcome.loss.isfinite())
    for name, value in sae.state_dict().items():
        assert torch.equal(value, before[0][name]), name
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[1][index][name]) for name, value in state.items())


def test_other_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="this TopK of 2 group"):
        FusedStep(TopK(8, 16, 2, groups=[4, 16]), Settings())
