"""Gated: its codes and its loss by hand, and what reaches its gates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluxsae.sae import Gated
from fluxsae.sae.objective import squared_errors
from tests.synthetic import randomised


def gated() -> Gated:
    sae = Gated(6, 10, l1=0.7, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.log_gain.normal_(0, 0.4, generator=generator)
        sae.b_mag.normal_(0, 0.4, generator=generator)
    randomised(sae)
    sae.normalise_rows()
    return sae


@torch.no_grad()
def by_hand(sae: Gated, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gates' pre-activations and codes, feature by feature, as the paper has them."""
    gates, codes = torch.zeros(len(x), 10), torch.zeros(len(x), 10)
    for n, token in enumerate(x - sae.b_dec):
        for f in range(10):
            along = float(sae.W_enc[f] @ token)
            gates[n, f] = along + float(sae.b_enc[f])
            magnitude = along * float(sae.log_gain[f].exp()) + float(sae.b_mag[f])
            codes[n, f] = max(magnitude, 0.0) if gates[n, f] > 0 else 0.0
    return gates, codes


def test_codes_and_loss_are_the_papers() -> None:
    sae, x = gated(), torch.randn(12, 6)
    gates, codes = by_hand(sae, x)
    assert torch.allclose(sae.activate(sae.project(x)), codes, atol=1e-5)
    output = sae.training_forward(x)
    assert torch.allclose(squared_errors(x, output), (x - codes @ sae.W_dec - sae.b_dec).square().sum(dim=1), atol=1e-4)
    assert float(output.penalty.detach()) == pytest.approx(0.7 * float(gates.relu().sum(dim=1).mean()), rel=1e-5)
    by_gates = gates.relu() @ sae.W_dec + sae.b_dec
    assert output.auxiliary is not None
    assert torch.allclose(output.auxiliary, (x - by_gates).square().sum(dim=1), atol=1e-4)
    assert torch.equal(output.fired, (codes > 0).any(dim=0)) and float(output.l0) == float((codes > 0).sum() / 12)


def test_the_error_alone_does_not_reach_gates_and_the_auxiliary_one_no_decoder() -> None:
    sae, x = gated(), torch.randn(12, 6)
    output = sae.training_forward(x)
    (to_gates,) = torch.autograd.grad(squared_errors(x, output).sum(), sae.b_enc, retain_graph=True)
    # Magnitudes do not depend on the gate's bias: it cancels.
    assert torch.allclose(to_gates, torch.zeros(10), atol=1e-4)
    assert output.auxiliary is not None
    found = torch.autograd.grad(output.auxiliary.sum(), [sae.b_enc, sae.W_dec, sae.b_mag], allow_unused=True)
    assert found[0].abs().sum() > 0 and found[1] is None and found[2] is None


def test_a_restarted_feature_begins_as_a_new_one() -> None:
    sae = gated()
    sae.restart(torch.tensor([3]), torch.nn.functional.normalize(torch.ones(1, 6)), torch.tensor(0.2))
    assert (
        float(sae.log_gain[3].detach()) == 0 and float(sae.b_mag[3].detach()) == 0 and float(sae.b_enc[3].detach()) == 0
    )


def test_dead_features_explain_by_their_magnitudes() -> None:
    sae, x = gated(), torch.randn(12, 6)
    features = torch.tensor([1, 4, 7])
    magnitudes = sae.magnitudes(sae.project(x))[:, features]
    assert torch.allclose(sae.reconstruct_from(x, features, 3), magnitudes @ sae.W_dec[features], atol=1e-5)
    sae.reconstruct_from(x, features, 2).square().sum().backward()
    assert sae.b_mag.grad is not None and int((sae.b_mag.grad != 0).sum()) <= 3
