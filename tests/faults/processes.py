"""Compares what one process leaves with what several do: `python -m tests.faults.processes`.

Every stage but training, whose batches depend on the number of processes, in 1, 2 and 3 processes with 0 and 2 workers
that read ahead.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.faults.kill import Stage, make_stages, result

STAGES = ("capture", "scores")


class Outcome(NamedTuple):
    """How a stage went in so many processes and workers; `failure` says how its files differ from one process's."""

    stage: str
    processes: int
    workers: int
    seconds: float
    failure: str


def config_for(stage: Stage, folder: Path, processes: int, workers: int) -> dict[str, Any]:
    config = stage.config(folder)
    if processes > 1:
        config["trainer"] = {**config["trainer"], "devices": processes, "strategy": "ddp"}
    if config["data"]["class_path"].endswith("ActivationData"):
        config["data"]["init_args"]["num_workers"] = workers
    return config


def start(verb: str, folder: Path, config: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run a command in a new interpreter, with what it says."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "fluxsae", verb, "-c", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def compare(
    stages: dict[str, Stage], names: tuple[str, ...], worlds: list[tuple[int, int]], folder: Path
) -> Iterator[Outcome]:
    """The first of `worlds` (processes, workers) makes the reference."""
    for name in names:
        stage, reference = stages[name], None
        for processes, workers in worlds:
            if workers > 0 and "images_per_batch" not in stage.config(folder)["data"]["init_args"]:
                continue
            out = folder / f"{name}-{processes}-{workers}"
            out.mkdir()
            started = time.monotonic()
            done = start(stage.verb, out, config_for(stage, out, processes, workers))
            seconds, found = time.monotonic() - started, result(stage, out)
            if done.returncode != 0:
                yield Outcome(name, processes, workers, seconds, f"code {done.returncode}: {done.stderr[-2000:]}")
                continue
            reference = reference or found
            other = sorted(key for key in {*found, *reference} if found.get(key) != reference.get(key))
            yield Outcome(name, processes, workers, seconds, f"{other} differ" if other else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    options = parser.parse_args()
    n_failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "inputs").mkdir()
        stages = make_stages(folder / "inputs")
        for each in compare(stages, STAGES, list(product(options.processes, options.workers)), folder):
            n_failed += bool(each.failure)
            verdict = each.failure or "the same files"
            print(f"{each.stage}: {each.processes} processes, {each.workers} workers, {each.seconds:.0f} s: {verdict}")
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
