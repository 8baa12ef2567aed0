"""The processes that train one SAE together: which of them see different tokens, and what those add up.

Legend: N tokens of one process, D width.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Shaped
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from fluxsae.runtime.cuda_graphs import clear_all


class Processes(NamedTuple):
    """Process `rank` of `n` processes that see different tokens. `group` is None if these are all processes of the run.

    Processes that share the features of one SAE see the same tokens and count as one. No method waits for a device;
    Lightning's own `strategy.reduce` does, because it sets up a barrier first.
    """

    rank: int
    n: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, trainer: Trainer) -> Processes:
        """This process among those of a Trainer's run."""
        share = trainer.distributed_sampler_kwargs
        if share is None:
            return cls(0, 1, None)
        group = None
        if isinstance(trainer.strategy, ModelParallelStrategy):
            group = trainer.strategy.device_mesh["data_parallel"].get_group()
        return cls(share["rank"], share["num_replicas"], group)

    def all_reduce(self, sums: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum over processes."""
        return self._reduce(sums, dist.ReduceOp.SUM)

    def all_reduce_async(self, sums: Shaped[Tensor, "*shape"]) -> dist.Work:
        """Start a sum over processes, in place. It runs beside later work of the device; `wait` for its end."""
        work = dist.all_reduce(sums, group=self.group, async_op=True)
        assert work is not None
        return work

    @property
    def recordable(self) -> bool:
        """Whether CUDA graphs can hold what processes exchange."""
        return self.n == 1 or dist.get_backend(self.group) == "nccl"

    def share(self, n_rows: int) -> slice:
        """This process's rows of as many, which `n` divides."""
        each = n_rows // self.n
        return slice(self.rank * each, (self.rank + 1) * each)

    def reduce_scatter_async(self, sums: Shaped[Tensor, "N *D"], share: Shaped[Tensor, "M *D"]) -> dist.Work:
        """Start a sum over processes of this process's share of the rows, into `share`; `wait` for its end."""
        work = dist.reduce_scatter_tensor(share, sums, group=self.group, async_op=True)
        assert work is not None
        return work

    def all_gather_(self, rows: Shaped[Tensor, "N *D"]) -> dist.Work:
        """Start to send each process's `share` of the rows to all others, in place; `wait` for its end."""
        given = rows.view(torch.uint8) if rows.dtype.itemsize == 1 else rows  # not all know how to send fp8
        work = dist.all_gather_into_tensor(given, given[self.share(len(rows))], group=self.group, async_op=True)
        assert work is not None
        return work

    def anywhere(self, flags: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """What holds in some process: one collective of a byte a flag."""
        return self._reduce(flags, dist.ReduceOp.MAX)

    def gather(self, rows: Shaped[Tensor, "N D"]) -> Shaped[Tensor, "M D"]:
        """The rows of all processes, which may bring different numbers of them, in the order of the processes."""
        if self.n == 1:
            return rows
        lengths = self.all_reduce(
            torch.eye(self.n, dtype=torch.int64, device=rows.device)[self.rank] * len(rows)
        ).tolist()
        padded = rows.new_zeros(max(lengths), rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.n == 1:
            return values
        values = values.clone()
        dist.all_reduce(values, operation, group=self.group)
        return values


class OneAllReduce(DDPStrategy):
    """A DDP strategy: each process has a whole SAE and its own tokens, and one all-reduce averages all gradients.

    Buffers are not sent before each step, because they change in the same way in every process.

    Args:
        compress: whether gradients are sent in bf16, which halves the bytes.
        options: further arguments of DDPStrategy and DistributedDataParallel.
    """

    def __init__(self, compress: bool = True, **options: Any) -> None:
        hook = bf16_compress_hook if compress else None
        self.compress = compress
        super().__init__(ddp_comm_hook=hook, gradient_as_bucket_view=True, bucket_cap_mb=_NO_LIMIT, **options)

    def setup_environment(self) -> None:
        # What is sent beside kernels shall not wait until the last of their blocks has begun.
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
        super().setup_environment()

    def teardown(self) -> None:
        clear_all()  # NCCL waits for graphs that hold its kernels, when its connections are closed
        super().teardown()

    def configure_ddp(self) -> None:
        super().configure_ddp()
        # An argument of DistributedDataParallel would do so too, but newer versions of torch call it otherwise.
        self.model.broadcast_buffers = False  # type: ignore[union-attr, assignment]


_NO_LIMIT = 1 << 20
"""Megabytes of gradients that one all-reduce may take: however many there are."""
