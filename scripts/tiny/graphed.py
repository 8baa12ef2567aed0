"""A whole training step, forward, backward and update, as one CUDA graph.

The bundled models are so narrow that launching their kernels takes longer than running them; a graph launches them all
at once. Without a GPU the same step runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 3
"""Eager steps before a capture: they compile, fill the allocator's pool and make the optimizer's state."""


class DeferredAdamW(torch.optim.AdamW):
    """AdamW whose `step` runs the closure alone; the closure itself calls `update`, inside the graph."""

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device, **options: Any) -> None:
        cuda = device.type == "cuda"
        super().__init__(parameters, lr=torch.zeros((), device=device), fused=cuda, capturable=cuda, **options)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        assert closure is not None
        return closure()

    def update(self) -> None:
        super().step()

    def set_rate(self, lr: float, device: torch.device) -> None:
        for group in self.param_groups:
            if group["lr"].device != device:  # as a checkpoint left it
                group["lr"] = torch.zeros((), device=device)
            group["lr"].fill_(lr)


class GraphedStep:
    """Runs `step(*inputs)`, which returns the loss: eagerly at first, then from a graph captured for these shapes."""

    def __init__(self, step: Callable[..., Tensor], enabled: bool) -> None:
        self.step, self.enabled = step, enabled
        self.graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self.seen: dict[tuple[torch.Size, ...], int] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple(x.shape for x in inputs)
        self.seen[shapes] = self.seen.get(shapes, 0) + 1
        if not self.enabled:
            return self.step(*inputs)
        if self.seen[shapes] <= WARM_UP:
            return self._aside(*inputs)
        if shapes not in self.graphs:
            self.graphs[shapes] = self._capture(inputs)
        graph, static, loss = self.graphs[shapes]
        for mine, given in zip(static, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return loss

    def _aside(self, *inputs: Tensor) -> Tensor:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self.step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    def _capture(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        static = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # records, and does not run
            loss = self.step(*static)
        return graph, static, loss
