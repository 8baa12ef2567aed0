"""CUDA graphs: what was launched once, kernel by kernel, is launched again in one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Graphs:
    """Runs a function the first time, records it as a CUDA graph the second, and replays it from then on.

    A key stands for a function that launches the same work on the same memory every time. What it returned when it was
    recorded is returned after every replay, which writes to the same places again.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._seen: set[Any] = set()
        self._recorded: dict[Any, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool: Any = None

    def run(self, key: Any, function: Callable[[], Any]) -> Any:
        if not self.enabled:
            return function()
        if key not in self._seen:
            self._seen.add(key)
            return function()
        if key not in self._recorded:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = function()
            self._pool = graph.pool()
            self._recorded[key] = graph, result
        graph, result = self._recorded[key]
        graph.replay()
        return result

    def clear(self) -> None:
        """Forget all recordings, as buffers that they write to are replaced."""
        self._seen.clear()
        self._recorded.clear()
