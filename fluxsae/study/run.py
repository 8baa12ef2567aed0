"""Runs a study's stages in order, and records how far it is."""

from __future__ import annotations

import contextlib
import difflib
import gc
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from fluxsae.files import FolderLock, write_json
from fluxsae.study.config_files import read_config
from fluxsae.study.plan import RECORD, Stage, Step, Study, plan, read_study, recorded, runs_of
from fluxsae.study.report import report

REPLACED = "replaced"

RunStage = Callable[[str, Path, Sequence[str], Path], None]
"""Runs one stage: its command, its config file, further arguments, and the study's folder."""


def run_study(
    config: Path,
    run_stage: RunStage,
    force: Collection[str] = (),
    until: str | None = None,
    root: Path | None = None,
) -> None:
    """Run the stages of the study in `config` that are missing or changed, and print a report.

    The earlier results of a changed stage are moved to `replaced/` in the study's folder, which keeps one generation. A
    stage that was interrupted continues where it stopped.

    Args:
        config: the study's file.
        run_stage: what runs a stage.
        force: stages to redo with what needs them, or `all`.
        until: the last stage to run.
        root: the study's folder, if another than the file says.
    """
    study = read_study(config, root)
    for name in (*force, *([until] if until else [])):
        if name != "all" and name not in study.names:
            near = difflib.get_close_matches(name, study.names, n=1)
            raise ValueError(
                f"this study has no stage {name!r}; "
                + (f"did you mean {near[0]!r}?" if near else f"it has {', '.join(study.names)}.")
            )
    for stage in study.stages:  # a wrong path in the last stage should not cost the time of the first
        read_config(stage.config, study.root)
    with _locked(study.root):
        _run_stages(study, run_stage, force, until)


def _free_memory() -> None:
    """The next stage wants what this one had, on the host and on a GPU."""
    import torch  # which takes seconds the first time: `fluxsae --help` need not wait for it

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _run_stages(study: Study, run_stage: RunStage, force: Collection[str], until: str | None) -> None:
    started = time.monotonic()
    stages = study.stages[: study.names.index(until) + 1] if until else study.stages
    n_run = 0
    for number, step in enumerate(plan(study, force), start=1):
        label = f"[{number}/{len(stages)}] {step.stage.name}"
        if not step.reason:
            _say(f"{label:<22} complete and unchanged, skipped")
        else:
            _say(f"{label:<22} {step.stage.command} -c {step.stage.config}  ({step.reason})")
            seconds = _run(study, step, run_stage, forced=bool({step.stage.name, "all"} & set(force)))
            _free_memory()
            _say(f"{'':<22} done in {_duration(seconds)}")
            n_run += 1
        if step.stage.name == until:
            break
    _say(f"\n{n_run} of {len(stages)} stages run in {_duration(time.monotonic() - started)}.")
    for line in report(study.root):
        _say(line)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    if not _is_first_process():
        yield
        return
    lock = FolderLock(folder)
    try:
        yield
    finally:
        lock.release()


def _run(study: Study, step: Step, run_stage: RunStage, forced: bool) -> float:
    """Run a stage and record it; the seconds that it took."""
    before = recorded(study.root).get(step.stage.name)
    values = {"key": step.key, "status": "started", "run": uuid4().hex, "upstream": runs_of(study, step.stage)}
    same = before is not None and (before["key"], before["upstream"]) == (step.key, values["upstream"])
    resumes = same and before is not None and before["status"] == "started" and not forced
    if before is not None and not resumes:
        _move_aside(study, step.stage)
    _record(study.root, step.stage.name, values)
    started = time.monotonic()
    # Captures go on by themselves; a training does from its last checkpoint, where it has kept one.
    resume = ["--ckpt_path", "last"] if resumes and step.stage.command == "fit" else []
    run_stage(step.stage.command, step.stage.config, resume, study.root)
    seconds = time.monotonic() - started
    absent = [str(output) for output in step.stage.outputs if not output.exists()]
    if absent:
        raise ValueError(
            f"stage {step.stage.name!r} ended without leaving {absent[0]}; "
            "make its config and the study's outputs agree."
        )
    told = {"status": "complete", "seconds": round(seconds, 1), "config": str(step.stage.config)}
    _record(study.root, step.stage.name, {**values, **told})
    return seconds


def _move_aside(study: Study, stage: Stage) -> None:
    """A capture may have taken days, so nothing is deleted that the last run left; what was moved before it is."""
    if not _is_first_process():
        return
    for output in stage.outputs:
        if output.exists():
            target = study.root / REPLACED / output.relative_to(study.root)
            if target.is_dir():
                shutil.rmtree(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            output.rename(target)
            _say(f"{'':<22} moved the earlier {output} to {target}")


def _record(folder: Path, stage: str, values: dict[str, Any]) -> None:
    if _is_first_process():
        write_json(folder / RECORD, {**recorded(folder), stage: values})


def _is_first_process() -> bool:
    """False in the further processes that a Trainer's strategy starts, which run this same command."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


def _say(text: str) -> None:
    if _is_first_process():
        print(text, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
