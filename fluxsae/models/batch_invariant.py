"""Computes each image of a batch as if it were alone, equal bit for bit.

A matrix product with another number of rows may add its terms in another order, and then rounds differently. On a CPU,
a single vector is multiplied by another routine than a batch of vectors, and threads share rows by their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class BatchInvariantLinear(TorchFunctionMode):
    """Inside this context linear layers are computed image by image, where the first dimension is `n_images` long.

    Everything else stays batched. Attention, elementwise functions and normalisations round an image in the same way in
    any batch.
    """

    def __init__(self, n_images: int) -> None:
        super().__init__()
        self.n_images = n_images

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not functional.linear or self.n_images == 1 or len(args[0]) != self.n_images:
            return func(*args, **(kwargs or {}))
        return torch.cat([func(one, *args[1:], **(kwargs or {})) for one in args[0].split(1)])
