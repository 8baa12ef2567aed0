"""Kills stages at random moments and starts them again: `python -m tests.faults.kill --kills 100 --stage capture`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from fluxsae.files.tables import read_csv
from fluxsae.sae import TopK, load_sae, save_sae
from fluxsae.scoring.scores import Scores
from fluxsae.shards.verification import verify
from tests.random_flux import random_flux
from tests.synthetic import randomised, token_shards

SITE = "transformer_blocks.1.ff"
KILLS_A_ROUND = 3
STEPS_A_CHECKPOINT = 4
"""How many steps of a training a kill may cost."""
PATIENCE = 300.0
"""Seconds after which a command that has not ended counts as hanging."""


class Stage(NamedTuple):
    """A command, where it is run and how its result is looked at.

    `config` makes the config for a folder; `again` is added to the arguments when it is started again. `named` tells
    which files must be the reference's whenever they are there; `look` raises when a half-made folder is not sound.
    """

    verb: str
    config: Callable[[Path], dict[str, Any]]
    named: Callable[[Path], bool]
    look: Callable[[Path], object]
    again: tuple[str, ...] = ()


class Run(NamedTuple):
    """How a command ended, by itself or (None) killed, and after how many seconds."""

    code: int | None
    seconds: float


class Reference(NamedTuple):
    """The files of a run that nothing happened to, and for how many seconds it wrote them."""

    files: dict[str, bytes]
    seconds: float


class Round(NamedTuple):
    """A folder whose making was killed `n_kills` times; `failure` says how it differs from one that was not."""

    n_kills: int
    failure: str = ""


class Start(NamedTuple):
    """A training of one process: the step that it began after, and the last that it ended."""

    began: int
    reached: int


class Diary(Callback):
    """Writes down where a training begins and which steps it ends: a line for each, `began` or `ended` and the step."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write("began", trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._write("ended", trainer)

    def _write(self, what: str, trainer: Trainer) -> None:
        with self.path.open("a") as file:
            file.write(f"{what} {trainer.global_step}\n")


def read_diary(path: Path) -> list[Start]:
    """The trainings that a `Diary` tells of, in order."""
    starts: list[Start] = []
    for what, step in (line.split() for line in path.read_text().splitlines()) if path.exists() else ():
        began = int(step) if what == "began" else starts.pop().began
        starts.append(Start(began, int(step)))
    return starts


class Host:
    """`tests.faults.host` as a process, or with `cold` a new interpreter for every command."""

    def __init__(self, folder: Path, cold: bool = False) -> None:
        self.log = folder / "log.txt"
        self.cold = cold
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self._process: subprocess.Popen[str] | None = None
        if not cold:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.host"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
                bufsize=1,
            )
            assert self._line(PATIENCE) == "ready"

    def run(
        self,
        arguments: list[str],
        kill_when: Callable[[float], float | None] | None = None,
        signum: signal.Signals = signal.SIGKILL,
        then: Callable[[], bool] | None = None,
    ) -> Run:
        """Run a command. `kill_when` is asked, with the seconds since the start, in how many more to kill it.

        After another signal than SIGKILL it ends by itself, and the seconds count from the signal. Once `then` says so,
        it gets SIGTERM.
        """
        started = time.monotonic()
        wait, group, reap = self._start(arguments)
        while True:
            seconds = time.monotonic() - started
            left = kill_when(seconds) if kill_when is not None else None
            if (left is not None and left <= 0) or seconds > PATIENCE:
                os.killpg(group, signum if seconds <= PATIENCE else signal.SIGKILL)
                if seconds <= PATIENCE and signum != signal.SIGKILL:
                    kill_when, started = None, time.monotonic()
                    continue
                reap()
                if seconds > PATIENCE:
                    raise TimeoutError(f"{arguments} had not ended after {PATIENCE:.0f} s")
                return Run(None, seconds)
            if then is not None and then():
                os.killpg(group, signal.SIGTERM)
                then = None
            code = wait(0.005 if left is None or left > 0.005 else left)
            if code is not None:
                return Run(code, time.monotonic() - started)

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.kill()  # it holds nothing, and takes seconds to end by itself
            self._process.wait(PATIENCE)
            self._process.stdin.close()
            self._process.stdout.close()

    def _start(self, arguments: list[str]) -> tuple[Callable[[float], int | None], int, Callable[[], object]]:
        if self._process is None:
            command = [sys.executable, "-m", "fluxsae", *arguments]
            with self.log.open("a") as log:
                child = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment, start_new_session=True)

            def wait(seconds: float) -> int | None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return child.wait(seconds)
                return None

            return wait, child.pid, child.wait
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(self.log), *arguments]) + "\n")
        group = int((self._line(PATIENCE) or "").split()[1])

        def ended(seconds: float) -> int | None:
            line = self._line(seconds)
            return None if line is None else int(line.split()[1])

        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(group, group)  # as the child does itself: whoever comes first
        return ended, group, lambda: self._line(PATIENCE)

    def _line(self, seconds: float) -> str | None:
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline().strip() if ready else None


@contextlib.contextmanager
def host(folder: Path, cold: bool = False) -> Iterator[Host]:
    one = Host(folder, cold)
    try:
        yield one
    finally:
        one.close()


def make_stages(inputs: Path) -> dict[str, Stage]:
    """The stages, small, on inputs that are made here."""
    flux = random_flux(inputs / "flux", 2, 1, heads=1, head_width=16, text_length=8, sample_size=32)
    lines = [{"prompt": f"scene {i}", "attributes": {"place": ("left", "right")[i % 2]}} for i in range(12)]
    (inputs / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shards = token_shards(inputs / "tokens", 12, 2, d_in=16)
    torch.manual_seed(0)
    sae = randomised(TopK(16, 24, 4))
    sae.set_statistics(shards.statistics, shards.spec)
    save_sae(inputs / "sae", sae)
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}

    def capture(folder: Path) -> dict[str, Any]:
        sizes = {"steps": [0, 2], "height": 32, "width": 32, "n_steps": 3}
        model = {"model": str(flux), "folder": str(folder / "capture"), "sites": [SITE], **sizes}
        prompts = {"prompts": str(inputs / "prompts.jsonl"), "repetitions": 2, "batch_size": 2, "images_per_shard": 3}
        return {
            "model": {"class_path": "fluxsae.FluxCapture", "init_args": model},
            "data": {"class_path": "fluxsae.PromptData", "init_args": prompts},
            "trainer": quiet,
        }

    def fit(folder: Path) -> dict[str, Any]:
        sae = {"class_path": "fluxsae.TopK", "init_args": {"d_in": 16, "n_features": 48, "k": 4}}
        model = {"sae": sae, "folder": str(folder / "sae"), "lr": 0.005, "dead_after": 2000}
        keep = {"dirpath": str(folder / "checkpoints"), "minutes": 0, "every_n_steps": STEPS_A_CHECKPOINT}
        callbacks = [
            {"class_path": "fluxsae.LastCheckpoint", "init_args": keep},
            {"class_path": "tests.faults.kill.Diary", "init_args": {"path": str(folder / "diary.txt")}},
        ]
        return {
            "seed_everything": 0,
            "model": {"class_path": "fluxsae.SAETraining", "init_args": model},
            "data": {
                "class_path": "fluxsae.ActivationData",
                "init_args": {"shards": str(inputs / "tokens"), "batch_size": 48},
            },
            "trainer": {
                **quiet,
                "max_epochs": 12,
                "check_val_every_n_epoch": 3,
                "logger": False,
                "default_root_dir": str(folder),
                "callbacks": callbacks,
            },
        }

    def scores(folder: Path) -> dict[str, Any]:
        table, prompts = str(folder / "features.csv"), str(inputs / "prompts.jsonl")
        callbacks = {
            "ScoresWriter": {"folder": str(folder / "scores"), "prompts": prompts},
            "AliveStatistics": {"features": table},
            "TopImages": {"features": table},
            "Attributes": {"features": table, "prompts": prompts},
        }
        return {
            "model": {"class_path": "fluxsae.SAEScoring", "init_args": {"sae": str(inputs / "sae")}},
            "data": {
                "class_path": "fluxsae.ActivationData",
                "init_args": {"shards": str(inputs / "tokens"), "images_per_batch": 1},
            },
            "trainer": {
                **quiet,
                "logger": False,
                "callbacks": [{"class_path": f"fluxsae.{k}", "init_args": v} for k, v in callbacks.items()],
            },
        }

    def study(folder: Path) -> dict[str, Any]:
        """Its stages' configs lie beside the folder."""
        own = str(folder / "capture" / SITE / "step-02")
        configs = {"capture": capture(folder), "fit": fit(folder), "scores": scores(folder)}
        configs["fit"]["data"]["init_args"]["shards"] = own
        configs["scores"]["data"]["init_args"]["shards"] = own
        configs["scores"]["model"]["init_args"]["sae"] = str(folder / "sae")
        outputs = {"capture": ["capture"], "fit": ["sae"], "scores": ["scores", "features.csv"]}
        stages = []
        for name, verb in (("capture", "predict"), ("fit", "fit"), ("scores", "predict")):
            path = folder.parent / f"{folder.name}-{name}.yaml"
            path.write_text(yaml.safe_dump(configs[name]))
            left = [str(folder / output) for output in outputs[name]]
            stages.append({"name": name, "command": verb, "config": str(path), "outputs": left})
        return {"folder": str(folder), "stages": stages}

    return {
        "study": Stage("study", study, _is_result, _look_at_study),
        "capture": Stage("predict", capture, lambda path: True, _look_at_capture),
        "fit": Stage("fit", fit, lambda path: path.parts[0] == "sae", _look_at_fit, ("--ckpt_path", "last")),
        "scores": Stage("predict", scores, lambda path: path.stem != "features", _look_at_scores),
    }


def _is_result(path: Path) -> bool:
    """Of a study: what tells no times, and is written once."""
    return path.parts[0] in ("capture", "sae", "scores")


def _look_at_study(folder: Path) -> None:
    _look_at_capture(folder)
    _look_at_fit(folder)
    if (folder / "scores" / "scores.json").exists():
        Scores.open(folder / "scores")


def _look_at_capture(folder: Path) -> None:
    for metadata in folder.rglob("metadata.json"):
        problems = verify(metadata.parent)
        if problems:
            raise ValueError(f"{metadata.parent} is called finished: {problems[0]}")


def _look_at_fit(folder: Path) -> None:
    for checkpoint in folder.rglob("[!.]*.ckpt"):
        torch.load(checkpoint, weights_only=True)
    for before, after in pairwise(read_diary(folder / "diary.txt")):
        if after.began < before.reached - STEPS_A_CHECKPOINT:
            raise ValueError(f"a training that was killed after step {before.reached} went on from {after.began}")
    if (folder / "sae" / "config.json").exists():
        load_sae(folder / "sae")


def _look_at_scores(folder: Path) -> None:
    if (folder / "scores" / "scores.json").exists():
        Scores.open(folder / "scores")
    if (folder / "features.csv").exists():
        rows = read_csv(folder / "features.csv")
        if len(rows) != 24 or any(None in row.values() for row in rows):
            raise ValueError(f"{folder / 'features.csv'} is no whole table")


def result(stage: Stage, folder: Path) -> dict[str, bytes]:
    """What a stage leaves: every file, hidden ones as well. Of a fit the SAE, as checkpoints tell their own times; of a
    study what its stages leave."""
    names = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    mine = {name for name in names if stage.verb not in ("fit", "study") or stage.named(name)}
    mine |= {name for name in names if stage.verb == "study" and name.name == "features.csv"}
    return {str(name): names[name].read_bytes() for name in mine}


def unbroken(one: Host, stage: Stage, folder: Path) -> Reference:
    """What the stage leaves when nothing happens to it. ValueError when it fails."""
    folder.mkdir()
    config, watch = folder.with_suffix(".yaml"), Moment(folder, None)
    config.write_text(yaml.safe_dump(stage.config(folder)))
    run = one.run([stage.verb, "-c", str(config)], watch)
    if run.code != 0 or watch.first is None:
        raise ValueError(f"the stage ended with code {run.code}: {one.log.read_text()[-2000:]}")
    return Reference(result(stage, folder), run.seconds - watch.first)


def run_round(one: Host, stage: Stage, folder: Path, unbroken: Reference, rng: Random, kills: int) -> Round:
    """Make `folder`, killed up to `kills` times at moments spread over the work, and compare with the unbroken run."""
    reference, seconds = unbroken
    folder.mkdir()
    config, n_kills = folder.with_suffix(".yaml"), 0
    arguments: list[str] = []
    config.write_text(yaml.safe_dump(stage.config(folder)))
    while True:
        watch = Moment(folder, rng.uniform(0, seconds) if n_kills < kills else None)
        run = one.run([stage.verb, "-c", str(config), *arguments], watch)
        if run.code is not None:
            break
        n_kills, arguments = n_kills + 1, list(stage.again)
        if problem := _problem(stage, folder):
            return Round(n_kills, f"after kill {n_kills}: {problem}")
        for name, data in result(stage, folder).items():
            hidden = any(part.startswith(".") for part in Path(name).parts)
            if not hidden and stage.named(Path(name)) and reference.get(name) != data:
                return Round(n_kills, f"after kill {n_kills}, {name} is under its name but not the reference's")
    if run.code != 0:
        return Round(n_kills, f"ended with code {run.code}: {one.log.read_text()[-2000:]}")
    if problem := _problem(stage, folder):
        return Round(n_kills, f"at its end: {problem}")
    found = result(stage, folder)
    other = sorted(name for name in {*found, *reference} if found.get(name) != reference.get(name))
    return Round(n_kills, f"{other} differ from an unbroken run's" if other else "")


def _problem(stage: Stage, folder: Path) -> str:
    try:
        stage.look(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Moment:
    """When to kill: so many seconds after the first file of this run lies in the folder."""

    def __init__(self, folder: Path, delay: float | None) -> None:
        self.folder = folder
        self.delay = delay
        self.first: float | None = None
        self.before = _state(folder)

    def __call__(self, seconds: float) -> float | None:
        if self.first is None:
            if _state(self.folder) != self.before:
                self.first = seconds
            return None
        return None if self.delay is None else self.first + self.delay - seconds


def _state(folder: Path) -> list[tuple[str, int]]:
    with contextlib.suppress(FileNotFoundError):  # files come and go while they are counted
        return [(str(path), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))]
    return []


def rounds(
    one: Host, stage: Stage, reference: Reference, folder: Path, kills: int, seed: int = 0, limit: float = float("inf")
) -> Iterator[Round]:
    """Rounds until `kills` kills have struck, or `limit` seconds are over."""
    started, rng, number = time.monotonic(), Random(seed), 0
    while kills > 0 and time.monotonic() - started < limit:
        done = run_round(one, stage, folder / f"round-{number}", reference, rng, min(kills, KILLS_A_ROUND))
        kills, number = kills - done.n_kills, number + 1
        yield done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stage", choices=["capture", "fit", "scores", "study"], default="capture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cold", action="store_true", help="a new interpreter for every start")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no round begins")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "inputs").mkdir()
        stage = make_stages(folder / "inputs")[options.stage]
        with host(folder, options.cold) as one:
            reference = unbroken(one, stage, folder / "unbroken")
            print(f"{len(reference.files)} files in {reference.seconds:.1f} s of work", flush=True)
            done = []
            for each in rounds(one, stage, reference, folder, options.kills, options.seed, options.limit):
                done.append(each)
                if each.failure:
                    print(f"round {len(done) - 1}: {each.failure}", flush=True)
    tried = sum(each.n_kills for each in done)
    survived = sum(each.n_kills for each in done if not each.failure)
    print(f"{options.stage}: survived {survived} of {tried} kills in {len(done)} rounds")
    return 0 if survived == tried else 1


if __name__ == "__main__":
    sys.exit(main())
