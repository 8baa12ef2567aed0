"""What a sharded SAE does that one process can show; with several, tests/test_distributed.py compares trainings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fluxsae.sae import L1, SAE, TopK
from fluxsae.sae.feature_rows import set_rows, whole
from fluxsae.sae.kinds.batch_topk import BatchTopK
from fluxsae.sae.kinds.jumprelu import JumpReLU
from fluxsae.sae.sharding import Sharded, gather, refuse_unshardable, shard
from tests.synthetic import randomised


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    dist.destroy_process_group()


@pytest.mark.parametrize("sae", [L1(6, 20), TopK(6, 20, 3), JumpReLU(6, 20)], ids=lambda sae: type(sae).__name__)
def test_an_sae_is_gathered_as_it_was_sharded(mesh: DeviceMesh, sae: SAE) -> None:
    before, x = {name: value.clone() for name, value in randomised(sae).state_dict().items()}, torch.randn(7, 6)
    recon = sae.training_forward(x).recon.detach()
    shard(sae, mesh)
    assert isinstance(sae, Sharded) and torch.allclose(sae.training_forward(x).recon, recon, atol=1e-6)
    one = gather(sae)
    assert type(one) is not type(sae) and isinstance(sae, type(one))
    for name, value in one.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_equal_pre_activations_leave_k_codes(mesh: DeviceMesh) -> None:
    sae = TopK(6, 20, 3)
    shard(sae, mesh)
    codes = sae.activate(torch.ones(5, 20))
    assert (codes > 0).sum(dim=1).tolist() == [3] * 5


def test_rows_are_set_where_they_are(mesh: DeviceMesh) -> None:
    sae = L1(6, 20)
    before = sae.W_dec.detach().clone()
    shard(sae, mesh)
    with torch.no_grad():
        set_rows(sae.W_dec, torch.tensor([3, 17]), torch.full((2, 6), 7.0))
    after = whole(sae.W_dec.detach())
    assert after[[3, 17]].eq(7).all() and torch.equal(after[4:17], before[4:17])


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (TopK(6, 21, 3), "n_features is 21, which 2 processes cannot share evenly; make it a multiple of 2"),
        (BatchTopK(6, 20, 3), "this BatchTopK do not train apart from each other"),
        (TopK(6, 20, 3, groups=[4, 20]), "this TopK do not train apart"),
        (JumpReLU(6, 20, target_l0=4.0), "without groups and target_l0, or"),
    ],
)
def test_what_cannot_be_sharded_is_refused(sae: SAE, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_unshardable(sae, 2)
