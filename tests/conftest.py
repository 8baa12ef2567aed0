"""Fixtures that the tests share."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, whose own functions it changes too

import pytest
import torch
from diffusers import FluxPipeline

from fluxsae.models.load import load_pipeline
from tests.random_flux import random_flux

torch.set_num_threads(1)  # test processes run beside each other, on matrices that no thread pool helps


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, shared out: `--dist worksteal` begins with a stretch of the list for each process.

    A long test that begins last is one that all other processes wait for.
    """
    n = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if item.get_closest_marker("slow")]
    short = [item for item in items if not item.get_closest_marker("slow")]
    items[:] = [item for i in range(n) for item in (*long[i::n], *_stretch(short, i, n))]


def _stretch(items: list[pytest.Item], i: int, n: int) -> list[pytest.Item]:
    """The i-th of n stretches: tests of a module stay together, for what they share is made once a process."""
    return items[len(items) * i // n : len(items) * (i + 1) // n]


LOCAL = {None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", b"localhost", socket.gethostname()}
called: list[str] = []
"""Every attempt of this process to reach another machine."""


def listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        address = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        host = address[0] if isinstance(address, tuple) else address
        inside = host in LOCAL or (event != "socket.getaddrinfo" and not isinstance(address, tuple))  # a Unix socket
        if not inside:
            called.append(f"{event} {address!r}")
            raise ConnectionRefusedError(f"tests may not reach {address!r}")


sys.addaudithook(listen)


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    """Nothing that a test runs may try to reach another machine, and hide that it could not."""
    before = len(called)
    yield
    attempts, called[before:] = called[before:], []
    assert attempts == []


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random FLUX of 2 dual-stream and 2 single-stream blocks, width 32, for 64×64 pixels."""
    return random_flux(tmp_path_factory.mktemp("random-flux"))


@pytest.fixture(scope="session")
def tiny_pipe(tiny_flux: Path) -> FluxPipeline:
    """The pipeline in `tiny_flux`; whoever hooks it must unhook it."""
    return load_pipeline(tiny_flux)
