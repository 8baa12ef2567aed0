"""JumpReLU: its straight-through gradients by hand, its penalty, its thresholds."""

from __future__ import annotations

import pytest
import torch

from fluxsae.sae import JumpReLU
from fluxsae.sae.dead import resample
from fluxsae.sae.kinds.jumprelu import jump, step
from tests.synthetic import randomised

PRE = torch.tensor([[0.95, 3.0], [1.05, 1.9], [0.2, 2.2]])
THETA = torch.tensor([1.0, 2.0])
BANDWIDTH = 0.5
"""Within a quarter of θ = 1 lie 0.95 and 1.05, of θ = 2 lie 1.9 and 2.2."""


def test_the_jump_by_hand() -> None:
    pre, theta = PRE.clone().requires_grad_(), THETA.clone().requires_grad_()
    codes = jump(pre, theta, BANDWIDTH)
    assert codes.tolist() == torch.tensor([[0.0, 3.0], [1.05, 0.0], [0.0, 2.2]]).tolist()
    weights = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    (codes * weights).sum().backward()
    assert pre.grad is not None and pre.grad.tolist() == [[0.0, 10.0], [2.0, 0.0], [0.0, 30.0]]
    assert theta.grad is not None
    assert theta.grad.tolist() == pytest.approx([-1.0 / 0.5 * (1 + 2), -2.0 / 0.5 * (20 + 30)])


def test_the_step_by_hand() -> None:
    pre, theta = PRE.clone().requires_grad_(), THETA.clone().requires_grad_()
    active = step(pre, theta, BANDWIDTH)
    assert active.tolist() == [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    weights = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    (active * weights).sum().backward()
    assert pre.grad is None and theta.grad is not None
    assert theta.grad.tolist() == pytest.approx([-(1 + 2) / 0.5, -(20 + 30) / 0.5])


def test_the_gradient_is_that_of_the_expected_loss() -> None:
    """The estimator's point: on average over smoothly spread tokens it is the true derivative."""
    generator = torch.Generator().manual_seed(0)
    pre = 2 * torch.rand(200_000, 1, generator=generator, dtype=torch.float64)
    theta = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    # E[code] = ∫ z/2 over θ..2 = (4 - θ²)/4, so dE/dθ = -θ/2; E[active] = (2 - θ)/2, so dE/dθ = -1/2.
    (of_code,) = torch.autograd.grad(jump(pre, theta, 0.1).mean(), theta)
    (of_count,) = torch.autograd.grad(step(pre, theta, 0.1).mean(), theta)
    assert float(of_code) == pytest.approx(-0.4, rel=0.05) and float(of_count) == pytest.approx(-0.5, rel=0.05)


def test_the_penalty_counts_codes() -> None:
    x = torch.randn(40, 8)
    sae = randomised(JumpReLU(8, 20, l0=0.25, threshold=0.5))
    run = sae.training_forward(x)
    assert float(run.penalty.detach()) == pytest.approx(0.25 * float(run.l0), rel=1e-5)
    sae.target_l0 = 2.0
    run = sae.training_forward(x)
    assert float(run.penalty.detach()) == pytest.approx(0.25 * (float(run.l0) / 2 - 1) ** 2, rel=1e-5)


def test_codes_are_above_their_own_thresholds() -> None:
    sae = randomised(JumpReLU(8, 20))
    with torch.no_grad():
        sae.log_threshold.copy_(torch.linspace(-3, 1, 20))
    x = torch.randn(50, 8)
    codes, pre = sae.encode(x), sae.pre_acts(x)
    assert torch.equal(codes > 0, pre > sae.threshold)
    assert torch.equal(codes[codes > 0], pre[pre > sae.threshold])


def test_a_restarted_feature_has_a_fresh_threshold() -> None:
    sae = randomised(JumpReLU(8, 20, threshold=0.3, bandwidth=2.0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)
    run = sae.training_forward(torch.randn(50, 8))
    (run.recon.square().sum() + run.penalty).backward()
    optimizer.step()
    moved = sae.threshold.detach().clone()
    dead = torch.tensor([2, 7])
    resample(sae, optimizer, dead, torch.nn.functional.normalize(torch.randn(2, 8), dim=1))
    assert torch.allclose(sae.threshold[dead], torch.tensor(0.3)) and bool((moved[dead] != sae.threshold[dead]).all())
    assert float(optimizer.state[sae.log_threshold]["exp_avg"][dead].abs().sum()) == 0.0
    alive = [i for i in range(20) if i not in (2, 7)]
    assert torch.equal(sae.threshold[alive], moved[alive])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "threshold is 0.0 and bandwidth 0.5, expected both to be above 0"),
        ({"bandwidth": -1.0}, "bandwidth -1.0, expected both to be above 0"),
        ({"target_l0": 21.0}, "target_l0 is 21.0, expected above 0 and at most n_features = 20"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JumpReLU(8, 20, **options)
