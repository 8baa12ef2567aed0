"""A process that reads files into memory which it shares with whoever started it.

Beside a training, a thread waits for the interpreter's lock after each of its calls, and the training for the thread;
another process has a lock of its own. This file is that process's program, too: run as a script it needs nothing
but the standard library, and is there in some hundredths of a second.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO, NamedTuple

_MOST_OPEN = 256
"""Files that the process has open at a time, about."""


class Span(NamedTuple):
    """Bytes to read: which file, where in it, where in the memory, and how many."""

    file: int
    offset: int
    target: int
    size: int


SPAN = struct.Struct("<IQQQ")
"""A `Span`."""
_COMMAND = struct.Struct("<II")
"""A number that the answer repeats, and how many spans follow."""
_ANSWER = struct.Struct("<IB3x")
"""The number of a command, and whether all of it was read."""


class Copier:
    """The process, from here. Its memory is `memory`, of `n_bytes`; `close` ends it.

    Args:
        paths: the files that spans speak of.
        n_bytes: of memory.
        n_threads: that read at a time.
    """

    def __init__(self, paths: Sequence[Path], n_bytes: int, n_threads: int) -> None:
        with _shareable(n_bytes) as file:
            self.memory = mmap.mmap(file.fileno(), n_bytes)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[file.fileno()],
                start_new_session=True,  # a Ctrl-C is for the training, which may want to end in its own time
            )
            assert self._process.stdin is not None and self._process.stdout is not None
            self._commands: BinaryIO = self._process.stdin  # type: ignore[assignment]  # typeshed: IO[bytes]
            self._answers = self._process.stdout.fileno()
            os.set_blocking(self._answers, False)
            self._arrivals = select.poll()
            self._arrivals.register(self._answers, select.POLLIN)
            told = {"memory": file.fileno(), "threads": n_threads, "paths": [str(path.absolute()) for path in paths]}
            self._send(json.dumps(told).encode() + b"\n")

    def read(self, number: int, spans: bytes) -> None:
        """Have spans read, each packed as `SPAN` says; `done` tells when that `number` is."""
        self._send(_COMMAND.pack(number, len(spans) // SPAN.size) + spans)

    def done(self, wait: bool) -> list[tuple[int, bool]]:
        """The numbers that have been dealt with since, and whether all their bytes were read; at least one for `wait`.

        RuntimeError when the process has ended.
        """
        if wait:
            self._arrivals.poll()
        try:
            found = os.read(self._answers, 1024 * _ANSWER.size)
        except BlockingIOError:
            return []
        if not found:
            raise self._ended()
        return [(number, whole == 1) for number, whole in _ANSWER.iter_unpack(found)]

    def close(self) -> None:
        """End the process, whatever it is doing; it writes no more."""
        self._process.kill()
        with contextlib.suppress(OSError):  # what it will not read any more
            self._commands.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _send(self, data: bytes) -> None:
        try:
            self._commands.write(data)
            self._commands.flush()
        except BrokenPipeError as error:
            raise self._ended() from error

    def _ended(self) -> RuntimeError:
        return RuntimeError(
            f"the process that reads shards ended with code {self._process.wait()}, probably for want of memory; "
            "start again, with fewer readers or a smaller buffer."
        )


def _shareable(n_bytes: int) -> BinaryIO:
    """Memory that is a file without a name, or where the system has none, a file on disk."""
    if hasattr(os, "memfd_create"):
        file: BinaryIO = os.fdopen(os.memfd_create("fluxsae"), "rb+")
    else:
        file = tempfile.TemporaryFile()  # type: ignore[assignment]  # noqa: SIM115
    file.truncate(n_bytes)
    return file


class _Opened:
    """A file that is open for as long as somebody has it."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if "fd" in self.__dict__:
            os.close(self.fd)


class _Files:
    """The files of a list, opened when they are asked for."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._opened: dict[int, _Opened] = {}
        self._lock = threading.Lock()

    def __getitem__(self, file: int) -> _Opened:
        with self._lock:
            if file not in self._opened:
                if len(self._opened) >= _MOST_OPEN:
                    self._opened.popitem()
                self._opened[file] = _Opened(self._paths[file])
            return self._opened[file]


def _read(span: Span, files: _Files, memory: memoryview) -> bool:
    """Whether the file had all of the bytes."""
    try:
        opened, done = files[span.file], 0
        while done < span.size:
            n_read = os.preadv(opened.fd, [memory[span.target + done : span.target + span.size]], span.offset + done)
            if n_read == 0:
                return False
            done += n_read
    except OSError:
        return False
    return True


def _serve() -> None:
    """What the process does until nobody is there to tell it more."""
    for sent_to_all in (signal.SIGINT, signal.SIGTERM):  # as a scheduler does: it is for the training to end
        signal.signal(sent_to_all, signal.SIG_IGN)
    commands = sys.stdin.buffer
    told = json.loads(commands.readline())
    memory, files = memoryview(mmap.mmap(told["memory"], 0)), _Files(told["paths"])
    waiting: SimpleQueue[tuple[int, list[Span]]] = SimpleQueue()

    def work() -> None:
        while True:
            number, spans = waiting.get()
            whole = all(_read(span, files, memory) for span in spans)
            with contextlib.suppress(BrokenPipeError):  # nobody is there any more
                os.write(sys.stdout.fileno(), _ANSWER.pack(number, whole))

    for _ in range(told["threads"]):
        threading.Thread(target=work, daemon=True).start()
    while len(head := commands.read(_COMMAND.size)) == _COMMAND.size:
        number, n_spans = _COMMAND.unpack(head)
        spans = commands.read(n_spans * SPAN.size)
        if len(spans) == n_spans * SPAN.size:
            waiting.put((number, [Span(*span) for span in SPAN.iter_unpack(spans)]))
    os._exit(0)


if __name__ == "__main__":
    _serve()
