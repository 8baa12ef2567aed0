"""CUDA graphs: what was launched once, kernel by kernel, is launched again in one piece."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Graphs:
    """Runs a function the first time, records it as a CUDA graph the second, and replays it from then on.

    A key stands for a function that launches the same work on the same memory every time. What it returned when it was
    recorded is returned after every replay, which writes to the same places again.
    """

    def __init__(self, enabled: bool) -> None:
        _all.add(self)
        self.enabled = enabled
        self._seen: set[Any] = set()
        self._recorded: dict[Any, _Recording] = {}
        self._pool: Any = None

    def run(self, key: Any, function: Callable[[], Any], reads: Any = None) -> Any:
        """`reads` is another run's result, on which the function works: where that was not recorded, and would lie
        elsewhere the next time, the function is neither."""
        if not self.enabled:
            return function()
        recording = self._recorded.get(key)
        if recording is None:
            lasting = reads is None or any(reads is other.result for other in self._recorded.values())
            ready = key in self._seen and lasting
            self._seen.add(key)
            if not ready:
                return function()
            recording = self._record(key, function, reads)
        elif recording.reads is not reads:
            return function()
        recording.graph.replay()
        return recording.result

    def clear(self) -> None:
        """Forget all recordings, as buffers that they write to are replaced."""
        self._seen.clear()
        self._recorded.clear()
        self._pool = None

    def _record(self, key: Any, function: Callable[[], Any], reads: Any) -> _Recording:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = function()
        self._pool = graph.pool()
        self._recorded[key] = _Recording(graph, result, reads)
        return self._recorded[key]


def clear_all() -> None:
    """Forget all recordings of everyone."""
    for graphs in _all:
        graphs.clear()


_all: weakref.WeakSet[Graphs] = weakref.WeakSet()


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    result: Any
    reads: Any
