"""Runs a command in several processes at once, which Lightning takes for those of one run."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence


def run_together(command: Sequence[str], n: int) -> None:
    """Return when all `n` processes have ended. RuntimeError, and no process is left, when one failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "GROUP_RANK": 0}
    told = {name: str(value) for name, value in (about | {"TORCHELASTIC_RUN_ID": "benchmark"}).items()}
    processes = []
    try:
        for rank in range(n):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env={**os.environ, **told, **own}))
        codes: list[int | None] = [None]
        while None in codes:
            time.sleep(0.05)
            codes = [process.poll() for process in processes]
            if bad := next((code for code in codes if code), None):
                raise RuntimeError(f"one of {n} processes ended with code {bad}; see its message above.")
    finally:
        for process in processes:
            process.kill()
            process.wait()
