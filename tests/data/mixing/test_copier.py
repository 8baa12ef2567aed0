"""The process that reads for a training: what it reads, what it cannot, and that it never outlives who started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fluxsae.data.mixing import copier
from fluxsae.data.mixing.copier import SPAN, Copier, Span, _Files, _read

N_BYTES = 1 << 16


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Three files of other bytes each, and one that is not there."""
    for name in "abc":
        (tmp_path / name).write_bytes(os.urandom(5000))
    return [tmp_path / name for name in "abcd"]


@pytest.fixture
def reader(paths: list[Path]) -> Iterator[Copier]:
    one = Copier(paths, N_BYTES, 2)
    yield one
    one.close()


def packed(*spans: Span) -> bytes:
    return b"".join(SPAN.pack(*span) for span in spans)


def answers(reader: Copier, n: int) -> dict[int, bool]:
    found: dict[int, bool] = {}
    while len(found) < n:
        found |= dict(reader.done(wait=True))
    return found


def test_bytes_come_from_where_they_are_to_where_they_are_wanted(reader: Copier, paths: Sequence[Path]) -> None:
    spans = [Span(i % 3, 7 * i, 300 * i, 300) for i in range(200)]
    for number in range(50):
        reader.read(number, packed(*spans[number * 4 : number * 4 + 4]))
    assert answers(reader, 50) == dict.fromkeys(range(50), True)
    files = [path.read_bytes() for path in paths[:3]]
    for file, offset, target, size in spans:
        assert reader.memory[target : target + size] == files[file][offset : offset + size]
    assert reader.done(wait=False) == []


def test_what_cannot_be_read_is_said_and_the_rest_goes_on(reader: Copier) -> None:
    reader.read(1, packed(Span(0, 4900, 0, 101)))  # one byte more than there is
    reader.read(2, packed(Span(3, 0, 0, 1)))  # no such file
    reader.read(3, packed(Span(0, 4900, 0, 100)))
    assert answers(reader, 3) == {1: False, 2: False, 3: True}


def test_more_files_than_may_be_open(reader: Copier, paths: Sequence[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copier, "_MOST_OPEN", 2)
    files, memory = _Files([str(path) for path in paths]), memoryview(bytearray(10))
    for file in (0, 1, 2, 0, 1, 2):
        assert _read(Span(file, 50, 0, 10), files, memory)
        assert bytes(memory) == paths[file].read_bytes()[50:60] and len(files._opened) <= 2


def test_a_file_system_that_gives_less_than_it_is_asked_for(
    paths: Sequence[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:7]], offset))
    memory = memoryview(bytearray(200))
    assert _read(Span(0, 1, 100, 100), _Files([str(path) for path in paths]), memory)
    assert bytes(memory) == bytes(100) + paths[0].read_bytes()[1:101]


def test_memory_of_a_system_without_nameless_files(paths: Sequence[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    reader = Copier(paths, N_BYTES, 1)
    reader.read(0, packed(Span(0, 0, 100, 50)))
    assert answers(reader, 1) == {0: True} and reader.memory[100:150] == paths[0].read_bytes()[:50]
    reader.close()


def test_signals_to_a_whole_group_do_not_end_it(reader: Copier) -> None:
    reader.read(0, packed(Span(0, 0, 0, 1)))
    answers(reader, 1)  # it is up
    for sent in (signal.SIGINT, signal.SIGTERM):
        os.kill(reader._process.pid, sent)
    reader.read(1, packed(Span(0, 0, 0, 1)))
    assert answers(reader, 1) == {1: True}


def test_its_end_is_told(reader: Copier) -> None:
    reader._process.kill()
    with pytest.raises(RuntimeError, match="ended with code -9"):
        reader.done(wait=True)
    with pytest.raises(RuntimeError, match="ended with code -9"):
        reader.read(0, packed(Span(0, 0, 0, 1)))


def test_it_ends_with_who_started_it(paths: Sequence[Path]) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from fluxsae.data.mixing.copier import Copier\n"
        "reader = Copier([Path(sys.argv[1])], 4096, 2)\n"
        "print(reader._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, paths[0]], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    pid, until = int(done.stdout), time.monotonic() + 20
    while _runs(pid):
        assert time.monotonic() < until
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
