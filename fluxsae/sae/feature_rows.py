"""Tensors with a row, or a number, a feature, whose rows may be spread over processes (see `parallel`).

Legend: F features, M some features.
"""

from __future__ import annotations

from jaxtyping import Int, Shaped
from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """A tensor with the rows of all processes, each of which must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_here(tensor: Shaped[Tensor, "F *shape"]) -> range:
    """Which rows of a tensor this process holds."""
    if not isinstance(tensor, DTensor):
        return range(len(tensor))
    n_rows = len(tensor.to_local())
    first = tensor.device_mesh.get_local_rank("tensor_parallel") * n_rows
    return range(first, first + n_rows)


def set_rows(
    tensor: Shaped[Tensor, "F *shape"], rows: Int[Tensor, "M"], values: Shaped[Tensor, "M *shape"] | float
) -> None:
    """tensor[rows] = values, of which each process sets the rows that it holds."""
    if not isinstance(tensor, DTensor):
        tensor[rows] = values
        return
    held = rows_here(tensor)
    here = (rows >= held.start) & (rows < held.stop)
    tensor.to_local()[rows[here] - held.start] = values[here] if isinstance(values, Tensor) else values


def add_rows(tensor: Shaped[Tensor, "F *shape"], values: Shaped[Tensor, "F *shape"]) -> None:
    """tensor += values, of which each process adds the rows that it holds."""
    if not isinstance(tensor, DTensor):
        tensor.add_(values)
        return
    held = rows_here(tensor)
    tensor.to_local().add_(values[held.start : held.stop])
