"""Jobs beside the main thread, and copies that nobody waits for."""

from __future__ import annotations

import threading

import pytest
import torch

from fluxsae.runtime.background import AT_ONCE, Background, HostCopy, side_by_side


def test_jobs_run_in_order_on_another_thread() -> None:
    background, done, threads = Background(), [], set()

    def job(i: int) -> None:
        threads.add(threading.get_ident())
        done.append(i)

    for i in range(50):
        background.put(lambda i=i: job(i))
    background.wait()
    background.stop()
    assert done == list(range(50)) and len(threads) == 1 and threading.get_ident() not in threads


def test_whoever_is_ahead_waits() -> None:
    background, gate, begun = Background(), threading.Event(), threading.Event()
    background.put(gate.wait)
    background.put(lambda: None)
    third = threading.Thread(target=lambda: (background.put(begun.set), None))
    third.start()
    assert not begun.wait(0.05) and third.is_alive()
    gate.set()
    third.join()
    background.wait()
    assert begun.is_set()
    background.stop()


def test_nothing_runs_after_a_job_that_fails() -> None:
    background, done = Background(), []

    def fail() -> None:
        raise OSError("the disk is full")

    background.put(fail)
    background.put(lambda: done.append(1))
    with pytest.raises(OSError, match="the disk is full"):
        background.wait()
    background.put(lambda: done.append(2))
    background.stop()
    assert not done


def test_jobs_that_have_not_begun_are_dropped() -> None:
    background, gate, begun, done = Background(), threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        gate.wait()
        done.append(1)

    background.put(first)
    background.put(lambda: done.append(2))
    assert begun.wait(10)
    threading.Timer(0.05, gate.set).start()
    background.stop()
    assert done == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_copy_holds_the_values_of_its_moment() -> None:
    """Also when the tensor's memory is given to others at once, and while the device is still at work."""
    copies = []
    for i in range(20):
        tensor = torch.full((1 << 22,), float(i), device="cuda")
        copies.append(HostCopy(tensor))
        del tensor
        torch.full((1 << 22,), -1.0, device="cuda")
    for i, copy in enumerate(copies):
        held = copy.wait()
        assert held.device.type == "cpu" and held.is_pinned() and bool((held == i).all())


def test_side_by_side_is_at_the_same_time_and_in_order() -> None:
    together = threading.Barrier(AT_ONCE)

    def work(i: int) -> int:
        together.wait(timeout=20)  # breaks unless so many are at it
        return 2 * i

    assert side_by_side(work, range(AT_ONCE * 2)) == list(range(0, AT_ONCE * 4, 2))


def test_side_by_side_raises_the_first_failure_once_all_have_ended() -> None:
    done = []

    def work(i: int) -> None:
        if i in (1, 3):
            raise OSError(f"item {i}")
        done.append(i)

    with pytest.raises(OSError, match="item 1"):
        side_by_side(work, range(9))
    assert sorted(done) == [0, 2, 4, 5, 6, 7, 8]
