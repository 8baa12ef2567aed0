"""Keeps some blocks of a transformer in host memory and brings each to the device in time, for cards that are small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Offloaded:
    """Blocks whose weights are in host memory. While one of them is computed, the next one is copied to the device.

    So the device holds at most two of them. Weights stay equal bit for bit. Between passes, the first one is copied.

    Args:
        blocks: in the order in which they run, with weights on the CPU.
        device: where they are computed.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._blocks = list(blocks)
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._home = {block: [_pinned(tensor, self._stream) for tensor in _weights(block)] for block in blocks}
        self._arrived: dict[nn.Module, torch.cuda.Event | None] = {}
        for i, block in enumerate(self._blocks):
            self._send_home(block)
            following = self._blocks[(i + 1) % len(self._blocks)]
            block.register_forward_pre_hook(lambda module, args, following=following: self._enter(module, following))
            block.register_forward_hook(self._leave)

    @property
    def on_device(self) -> list[nn.Module]:
        """The blocks that are on the device, or on their way."""
        return list(self._arrived)

    def _enter(self, block: nn.Module, following: nn.Module) -> None:
        for other in set(self._arrived) - {block}:  # left there by a pass that ended half-way
            self._send_home(other)
        self._fetch(block)
        arrived = self._arrived[block]
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)
        self._fetch(following)

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:
        if len(self._blocks) > 1:
            self._send_home(block)

    def _fetch(self, block: nn.Module) -> None:
        if block in self._arrived:
            return
        computing = None if self._stream is None else torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            for weight, home in zip(_weights(block), self._home[block], strict=True):
                weight.data = torch.empty_like(home, device=self._device).copy_(home, non_blocking=True)
                if computing is not None:  # its memory is not given away before the computation is done
                    weight.data.record_stream(computing)
            self._arrived[block] = None if self._stream is None else self._stream.record_event()

    def _send_home(self, block: nn.Module) -> None:
        """Nothing is copied back: weights do not change."""
        self._arrived.pop(block, None)
        for weight, home in zip(_weights(block), self._home[block], strict=True):
            weight.data = home


def spread(n_blocks: int, n_chosen: int) -> list[int]:
    """`n_chosen` of `n_blocks` indices, evenly spaced, so that a copy has the time of several blocks."""
    return [(i * n_blocks + n_blocks // 2) // n_chosen for i in range(n_chosen)]


def _weights(block: nn.Module) -> list[Tensor]:
    return [*block.parameters(), *block.buffers()]


def _pinned(tensor: Tensor, stream: torch.cuda.Stream | None) -> Tensor:
    return tensor.data if stream is None else tensor.data.cpu().pin_memory()
