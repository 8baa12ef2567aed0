"""What is recorded as a graph, and when; with a stand-in for CUDA's graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fluxsae.runtime.cuda_graphs import Graphs


class Recorder:
    """Counts replays of what was recorded."""

    replays = 0

    def pool(self) -> int:
        return 1

    def replay(self) -> None:
        Recorder.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    @contextlib.contextmanager
    def record(graph: Recorder, **_: Any) -> Iterator[None]:
        yield

    Recorder.replays = 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", record)
    return Graphs(enabled=True)


def test_the_second_run_is_recorded_and_later_ones_replay_it(graphs: Graphs) -> None:
    results = [graphs.run("key", object) for _ in range(4)]
    assert Recorder.replays == 3
    assert results[0] is not results[1] and results[1] is results[2] is results[3]


def test_what_reads_a_passing_result_is_not_recorded(graphs: Graphs) -> None:
    """Its memory is somebody else's by the next run."""
    for _ in range(3):
        graphs.run("reader", object, reads=object())
    assert Recorder.replays == 0
    for _ in range(2):
        found = graphs.run("found", object)
    reader = graphs.run("reader", object, reads=found)
    assert graphs.run("reader", object, reads=found) is reader
    assert graphs.run("reader", object, reads=object()) is not reader


def test_a_reader_is_recorded_anew_after_what_it_reads(graphs: Graphs) -> None:
    def run() -> tuple[Any, Any]:
        found = graphs.run("found", object)
        return found, graphs.run("reader", lambda: found, reads=found)

    for _ in range(3):
        run()
    graphs.clear()
    for _ in range(4):
        found, read = run()
        assert found is read
