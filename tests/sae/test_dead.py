"""Dead features: what AuxK reaches, and what a restart leaves behind."""

from __future__ import annotations

import torch

from fluxsae.sae import TopK
from fluxsae.sae.dead import aux_error, draw_directions, resample


def trained() -> tuple[TopK, torch.optim.Optimizer]:
    torch.manual_seed(0)
    sae = TopK(6, 20, 3)
    optimizer = torch.optim.Adam(sae.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        (sae.training_forward(torch.randn(40, 6)).recon - 1).square().sum().backward()
        optimizer.step()
    return sae, optimizer


def test_aux_gradients_reach_dead_features_only() -> None:
    sae, _ = trained()
    sae.zero_grad()
    x, dead = torch.randn(40, 6), torch.tensor([2, 5, 11])
    aux_error(sae, x, x - sae.training_forward(x).recon, dead, aux_k=2).backward()
    assert sae.W_dec.grad is not None and sae.W_enc.grad is not None
    touched = sae.W_dec.grad.abs().sum(dim=1).nonzero().flatten().tolist()
    assert touched and set(touched) <= {2, 5, 11}
    assert set(sae.W_enc.grad.abs().sum(dim=1).nonzero().flatten().tolist()) <= {2, 5, 11}
    assert sae.b_dec.grad is None


def test_the_aux_error_teaches_dead_features_the_residual() -> None:
    sae, _ = trained()
    dead, pattern = torch.arange(10), torch.randn(6)
    x = torch.rand(60, 1) * pattern  # a residual in one direction, which the input tells
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.02)
    errors = []
    for _ in range(60):
        error = aux_error(sae, x, x, dead, aux_k=4)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.1 * errors[0]


def test_with_no_code_the_aux_error_is_the_residual() -> None:
    sae, _ = trained()
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    x = torch.randn(8, 6)
    error = torch.randn(8, 6)
    expected = error.square().sum(dim=1).mean()
    assert torch.allclose(aux_error(sae, x, error, torch.tensor([1]), aux_k=3), expected)


def test_resampling_restarts_rows_and_zeroes_adam_moments() -> None:
    sae, optimizer = trained()
    kept = sae.W_dec.detach().clone()
    dead, alive = torch.tensor([3, 8]), torch.tensor([i for i in range(20) if i not in (3, 8)])
    directions = torch.nn.functional.normalize(torch.randn(2, 6), dim=1)
    resample(sae, optimizer, dead, directions)
    assert torch.equal(sae.W_dec[dead], directions) and torch.equal(sae.W_dec[alive], kept[alive])
    assert torch.equal(sae.b_enc[dead], torch.zeros(2))
    length = sae.restart_gain * sae.W_enc[alive].norm(dim=1).mean()
    assert torch.allclose(sae.W_enc[dead], length * directions)
    for parameter in (sae.W_enc, sae.b_enc, sae.W_dec):
        for moment in ("exp_avg", "exp_avg_sq"):
            values = optimizer.state[parameter][moment]
            assert float(values[dead].abs().sum()) == 0.0 and float(values[alive].abs().sum()) > 0.0
        assert float(optimizer.state[parameter]["step"]) == 3.0


def test_new_directions_come_from_the_tokens_worst_explained() -> None:
    sae, _ = trained()
    x, error = torch.randn(10, 6), torch.full((10, 6), 1e-3)
    worst = [2, 5, 6, 9]
    error[worst] = 5.0
    drawn = draw_directions(sae, x, error, 4)
    expected = torch.nn.functional.normalize(x[worst] - sae.b_dec.detach(), dim=1)
    same = drawn @ expected.T > 1 - 1e-5  # each token once: features that start alike would stay twins
    assert same.sum(dim=0).tolist() == same.sum(dim=1).tolist() == [1] * 4
