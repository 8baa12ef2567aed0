"""The hand-made training step on a GPU, at sizes where features fire on thousands of tokens."""

from __future__ import annotations

import copy
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import normalize

pytest.importorskip("triton")

from fluxsae.runtime.cuda_graphs import clear_all
from fluxsae.runtime.distributed import Processes
from fluxsae.sae import L1, SAE, TopK
from fluxsae.sae.dead import aux_error
from fluxsae.sae.objective import squared_errors, token_weights
from fluxsae.training.steps.fused.settings import Settings
from fluxsae.training.steps.fused.step import ALONE, FusedStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

D_IN, N_FEATURES, N_TOKENS = 512, 4000, 8192
KINDS: dict[str, Any] = {"sparse": (TopK, 32), "sparse, k = 96": (TopK, 96), "dense TopK": (TopK, 200), "L1": (L1, 0.1)}


def skewed_tokens(n_tokens: int, generator: torch.Generator) -> Tensor:
    """Sums of a few of 2,048 directions, the first of which are in half of all tokens, and noise."""
    directions = normalize(
        torch.randn(2048, D_IN, generator=torch.Generator("cuda").manual_seed(1), device="cuda"), dim=1
    )
    share = (40 / torch.arange(1, 2049, device="cuda")).clamp(max=0.5)
    codes = (torch.rand(n_tokens, 2048, generator=generator, device="cuda") < share).float()
    noise = torch.randn(n_tokens, D_IN, generator=generator, device="cuda")
    return (3 * codes @ directions + 0.05 * noise).bfloat16()


def train(
    sae: SAE, graphs: bool, fp8: bool, n_steps: int = 12, processes: Processes = ALONE
) -> tuple[SAE, list[float]]:
    """A few steps, with partial batches and changing numbers of dead features, some of them more than AuxK uses.

    Of each batch, every process takes its share of tokens.
    """
    sae = copy.deepcopy(sae).to("cuda")
    fused = FusedStep(sae, Settings(aux_k=256, aux_coef=1 / 32, graphs=graphs, fp8_encoder=fp8), processes)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    ramp = 0.01 / fused.form.penalty if fused.form.penalty else 1.0
    generator = torch.Generator("cuda").manual_seed(0)
    losses, dead = [], torch.zeros(0, dtype=torch.int64, device="cuda")
    for step in range(n_steps):
        if step % 3 == 2:
            dead = torch.arange((0, 100, 1500, 101)[step // 3 % 4], device="cuda")
        tokens = skewed_tokens(700 if step % 5 == 4 else N_TOKENS, generator)
        outcome = fused.forward(tokens[processes.share(len(tokens))], dead, ramp)
        fused.update(optimizer)
        losses.append(float(outcome.loss))
    fused.synchronize_weights()
    return sae, losses


def by_autograd(sae: SAE, n_steps: int = 12) -> tuple[SAE, list[float]]:
    """The same steps in float32."""
    sae = copy.deepcopy(sae).to("cuda")
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    generator = torch.Generator("cuda").manual_seed(0)
    losses, dead = [], torch.zeros(0, dtype=torch.int64, device="cuda")
    for step in range(n_steps):
        if step % 3 == 2:
            dead = torch.arange((0, 100, 1500, 101)[step // 3 % 4], device="cuda")
        x = sae.normalise(skewed_tokens(700 if step % 5 == 4 else N_TOKENS, generator))
        run = sae.training_forward(x)
        squared = squared_errors(x, run)
        weights = token_weights(squared, 10.0)
        loss = (weights * squared).mean() + (0.01 * run.penalty / sae.l1 if isinstance(sae, L1) else 0.0)
        if len(dead):
            loss = loss + aux_error(sae, x, (x - run.recon).detach(), dead, 256, weights) / 32
        optimizer.zero_grad()
        (loss / D_IN).backward()
        sae.remove_parallel_gradient()
        optimizer.step()
        sae.normalise_rows()
        losses.append(float(loss.detach()) / D_IN)
    return sae, losses


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_autograds_to_rounding(kind: str, fp8: bool) -> None:
    make, option = KINDS[kind]
    sae = make(D_IN, N_FEATURES, option, seed=0)
    ours, losses = train(sae, graphs=False, fp8=fp8)
    theirs, expected = by_autograd(sae)
    assert losses == pytest.approx(expected, rel=0.02)
    for (name, value), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert float(((value - other).norm() / other.norm()).detach()) < (0.2 if fp8 else 0.1), name


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_repeat_what_they_recorded(kind: str, fp8: bool) -> None:
    """Steps by graphs and steps without end at the same weights, to the bit."""
    make, option = KINDS[kind]
    sae = make(D_IN, N_FEATURES, option, seed=0)
    recorded, plain = train(sae, graphs=True, fp8=fp8), train(sae, graphs=False, fp8=fp8)
    assert recorded[1] == plain[1]
    assert all(torch.equal(a, b) for a, b in zip(recorded[0].parameters(), plain[0].parameters(), strict=True))


def one_of_two(rank: int, address: str, folder: Path) -> None:
    """A process that trains with another one; the first leaves its SAEs in `folder`."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=address, rank=rank, world_size=2)
    for name, (make, option) in KINDS.items():
        for fp8 in (False, True):
            sae = make(D_IN, N_FEATURES, option, seed=0)
            both, _ = train(sae, graphs=True, fp8=fp8, processes=Processes(rank, 2, None))
            if rank == 0:
                alone, _ = train(sae, graphs=True, fp8=fp8)
                torch.save((alone.state_dict(), both.state_dict()), folder / f"{name}, {fp8}.pt")
    clear_all()
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_two_gpus_make_the_steps_of_one(tmp_path: Path) -> None:
    """By graphs with NCCL's exchanges in them, as tokens are shared out and features stepped in shares."""
    with socket.create_server(("localhost", 0)) as free:
        address = f"tcp://localhost:{free.getsockname()[1]}"
    mp.spawn(one_of_two, (address, tmp_path), nprocs=2)
    found = sorted(tmp_path.glob("*.pt"))
    assert len(found) == 2 * len(KINDS)
    for path in found:
        alone, both = torch.load(path, weights_only=True)
        for name, value in both.items():
            assert float((value - alone[name]).norm()) <= 0.1 * float(alone[name].norm()), (path.stem, name)
