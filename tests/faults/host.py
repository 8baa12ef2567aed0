"""Runs `fluxsae` commands in forks of a process that has imported everything, so that what is killed is work.

Each line on stdin is JSON: a file for the command's output, and its arguments. The answers are lines `started PID`
and `ended STATUS`. A command is a process group of its own, as a shell would start it.
"""

from __future__ import annotations

import json
import os
import sys

import lightning.pytorch.callbacks
import torch

import fluxsae.capture.module
import fluxsae.cli.trainer
import fluxsae.models.generation
import fluxsae.scoring.module
from fluxsae.cli.command import main

PRELOADED = (lightning.pytorch.callbacks, fluxsae.capture, fluxsae.scoring, fluxsae.cli.trainer)


def serve() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        log, *arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(log, arguments)
        print(f"started {child}", flush=True)
        _, status = os.waitpid(child, 0)
        print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)


def _run(log: str, arguments: list[str]) -> None:
    """In the fork: never returns."""
    os.setpgid(0, 0)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 70
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
