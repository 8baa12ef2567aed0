"""SAEs too wide for one device: each process of a mesh holds some of the features, and all see the same tokens.

Parameters with a row a feature are spread as DTensors: optimizers, checkpoints and what concerns single rows take them
as they are. A pass over tokens computes with the rows held here and adds up the processes' reconstructions.
Legend: N tokens, D width, F features, H features held here, M some features, p processes that share them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.functional import pad

from fluxsae.sae.base import SAE, TrainOutput, kinds_with
from fluxsae.sae.feature_rows import rows_here, whole


class Sharded(SAE):
    """An SAE that `shard` has spread. Pre-activations and codes are of the features held here, all else is of all.

    Every process computes the same reconstruction, so gradients of its own rows need no other process. Only the
    gradient of b_dec is summed over processes.
    """

    group: dist.ProcessGroup
    whole_kind: type[SAE]
    _found: tuple[Tensor, Tensor] | None = None

    def project(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch H"]:
        with self._rows_here():
            return (x - _SumOfGradients.apply(self.b_dec, self.group)) @ self.W_enc.T + self.b_enc

    def activate(self, pre_acts: Float[Tensor, "*batch H"]) -> Float[Tensor, "*batch H"]:
        with self._rows_here():
            return super().activate(pre_acts)  # type: ignore[safe-super]  # a kind's own comes next

    def training_forward(self, x: Float[Tensor, "N D"]) -> TrainOutput:
        with self._rows_here():
            return super().training_forward(x)

    def train_output(self, pre_acts: Float[Tensor, "N H"], codes: Float[Tensor, "N H"]) -> TrainOutput:
        run = super().train_output(pre_acts, codes)
        penalty, l0 = self._total(torch.stack([run.penalty, run.l0.to(run.penalty)]))
        return run._replace(penalty=penalty, l0=l0.detach(), fired=self.of_all(run.fired))

    def reconstructions(self, codes: Float[Tensor, "N H"]) -> list[Float[Tensor, "N D"]]:
        with self._rows_here():
            return [self._total(codes @ self.W_dec) + self.b_dec]

    def reconstruct_from(self, x: Float[Tensor, "N D"], features: Int[Tensor, "M"], k: int) -> Float[Tensor, "N D"]:
        rows = self._held(features)
        with self._rows_here():
            pre = (x - self.b_dec.detach()) @ self.W_enc[rows].T + self.b_enc[rows]
            return self._total(self._largest(pre, k) @ self.W_dec[rows])

    def of_all(self, numbers: Shaped[Tensor, "H *shape"]) -> Shaped[Tensor, "F *shape"]:
        everyone = numbers.new_empty(dist.get_world_size(self.group) * len(numbers), *numbers.shape[1:])
        dist.all_gather_into_tensor(everyone, numbers.contiguous(), group=self.group)
        return everyone

    @contextmanager
    def _rows_here(self) -> Iterator[None]:
        """Within, parameters are plain tensors of the rows held here, whose gradients reach the parameters."""
        spread = dict(self._parameters)
        here: dict[str, Any] = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in spread.items()}
        self._parameters.update(here)
        try:
            yield
        finally:
            self._parameters.update(spread)

    def _held(self, features: Int[Tensor, "M"]) -> Int[Tensor, "H"]:
        """Which rows here are among `features`. For the same tensor as the last time, nothing waits for its device."""
        if self._found is None or self._found[0] is not features:
            here = rows_here(self.W_dec)
            self._found = (features, features[(features >= here.start) & (features < here.stop)] - here.start)
        return self._found[1]

    def _largest(self, pre_acts: Float[Tensor, "N H"], k: int) -> Float[Tensor, "N H"]:
        """The k largest of each token where positive, else 0: exactly, as each process offers its own k largest."""
        values, indices = pre_acts.detach().topk(min(k, pre_acts.shape[1]), dim=1, sorted=False)
        offered = self.of_all(pad(values, (0, k - values.shape[1]), value=-torch.inf))
        offered = rearrange(offered, "(p n) k -> n (p k)", n=len(values))
        best = torch.zeros_like(offered, dtype=torch.bool)
        best.scatter_(1, offered.topk(k, dim=1, sorted=False).indices, True)
        mine = best[:, dist.get_rank(self.group) * k :][:, : values.shape[1]]
        chosen = torch.zeros_like(pre_acts, dtype=torch.bool).scatter_(1, indices, mine)
        return torch.where(chosen, pre_acts.relu(), 0.0)

    def _total(self, part: Tensor) -> Tensor:
        total: Tensor = _Sum.apply(part, self.group)
        return total


def shard(sae: SAE, mesh: DeviceMesh) -> None:
    """Spread an SAE's features evenly over the `tensor_parallel` dimension of `mesh`, from the first process's weights.

    The object becomes a `Sharded` one, as FSDP changes the class of what it shards. A second time, nothing happens.
    ValueError for features that cannot be spread.
    """
    if isinstance(sae, Sharded):
        return
    refuse_unshardable(sae, mesh["tensor_parallel"].size())
    per_feature = {id(parameter) for parameter in sae.per_feature}
    for name, parameter in list(sae.named_parameters()):
        place = Shard(0) if id(parameter) in per_feature else Replicate()
        setattr(sae, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Replicate(), place])))
    kind, sharded = type(sae), sae.sharded_form()
    assert sharded is not None
    sae.__class__ = sharded
    assert isinstance(sae, Sharded)
    sae.whole_kind = kind
    sae.group = mesh["tensor_parallel"].get_group()


def refuse_unshardable(sae: SAE, n: int) -> None:
    """ValueError for an SAE whose features `n` processes cannot share."""
    if sae.n_features % n:
        raise ValueError(
            f"n_features is {sae.n_features}, which {n} processes cannot share evenly; make it a multiple of {n}."
        )
    if sae.sharded_form() is None or len(sae.groups) > 1:
        raise ValueError(
            f"the features of this {type(sae).__name__} do not train apart from each other, so processes cannot share "
            f"them; choose one of {', '.join(kinds_with('sharded_form'))} without groups and target_l0, or "
            "DDPStrategy, where each process holds them all."
        )


@torch.no_grad()
def average_gradients(sae: SAE) -> None:
    """Where groups of processes train a sharded SAE on different tokens, make each gradient the mean over groups."""
    if not isinstance(sae, Sharded) or not isinstance(sae.b_dec, DTensor):
        return
    groups = sae.b_dec.device_mesh["data_parallel"]
    if groups.size() == 1:
        return
    for parameter in sae.parameters():
        if isinstance(parameter.grad, DTensor):
            gradient = parameter.grad.to_local()
            dist.all_reduce(gradient, group=groups.get_group())
            gradient.div_(groups.size())


def gather(sae: SAE) -> SAE:
    """The whole SAE, on the CPU. An SAE that is not sharded is returned as it is. All its processes must call this."""
    if not isinstance(sae, Sharded):
        return sae
    one = sae.whole_kind(sae.d_in, sae.n_features, **sae.options())
    one.load_state_dict({name: whole(value).cpu() for name, value in sae.state_dict().items()})
    one.spec, one.mean_norm = sae.spec, sae.mean_norm
    return one


class _Sum(torch.autograd.Function):
    """The sum over processes. Each goes on with it alike, so the gradient of each part is the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.mark_dirty(part)
        dist.all_reduce(part, group=group)
        return part

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SumOfGradients(torch.autograd.Function):
    """What every process holds and uses for its own features: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
