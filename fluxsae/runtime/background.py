"""Work on the host beside work on the device: copies that nobody waits for, jobs in order, and jobs side by side."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

MOST_WAITING = 2
"""Jobs that are not done, beyond which whoever hands over another one waits: a bound on the memory they hold."""

AT_ONCE = max(2, min(4, (os.cpu_count() or 1) // 4))
"""Threads of `side_by_side`."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`work` of every item, a few at a time. Raises what the first that failed raised, once all have ended."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(len(items), AT_ONCE)) as pool:
        return [future.result() for future in [pool.submit(work, item) for item in items]]


class Background:
    """One thread that runs jobs in the order in which they came. After one that raises, none runs any more."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fluxsae-background")
        self._jobs: deque[Future[None]] = deque()
        self._failed = False

    def put(self, job: Callable[[], None]) -> None:
        """Hand over a job. Raises what an earlier one raised."""
        while len(self._jobs) >= MOST_WAITING:
            self._jobs.popleft().result()
        self._jobs.append(self._thread.submit(self._run, job))

    def wait(self) -> None:
        """Return once all jobs are done. Raises what the first that failed raised."""
        while self._jobs:
            self._jobs.popleft().result()

    def stop(self) -> None:
        """Drop the jobs that have not begun and return once the one under way has ended, however it ends."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._jobs.clear()

    def _run(self, job: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            job()
        except BaseException:
            self._failed = True
            raise


class HostCopy:
    """A tensor on its way to host memory: from a GPU to page-locked memory, on a stream beside the computation.

    Made, it holds the values of that moment in the current stream's order, and `wait` returns them.
    """

    def __init__(self, tensor: Shaped[Tensor, "..."]) -> None:
        self._tensor = tensor
        self._done: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._begin(tensor)

    def wait(self) -> Shaped[Tensor, "..."]:
        """The values in host memory; only the calling thread waits."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensor

    def _begin(self, tensor: Tensor) -> None:
        stream = _copy_stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True)
        with torch.cuda.stream(stream):
            self._tensor.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        tensor.record_stream(stream)  # its memory is not given away before the copy is done


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
