"""What a study is, and what is to be done about each of its stages.

A stage's key is a hash of all that its result depends on; a stage that is complete under the same key is skipped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from fluxsae.files import hash_json, hash_of_ends, read_json, unknown_key, weights_folder
from fluxsae.study.config_files import folders, read_mapping, study_root, substitute

Command = Literal["fit", "validate", "predict", "test", "figures"]
RECORD = "study.json"


@dataclass(frozen=True)
class Stage:
    """One command of a study.

    Args:
        name: what `--force` and `needs` call it.
        command: the `fluxsae` command that runs it.
        config: its config file.
        outputs: files and folders in the study's folder that it leaves; complete means that all are there.
        needs: the stages whose results it reads; all before it by default.
    """

    name: str
    command: Command
    config: Path
    outputs: tuple[Path, ...]
    needs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Study:
    """A folder, the study's root, and the stages that fill it."""

    root: Path
    stages: tuple[Stage, ...]
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(stage.name for stage in self.stages))
        for index, stage in enumerate(self.stages):
            if stage.name in self.names[:index]:
                raise ValueError(f"two stages are called {stage.name!r}; give each a name of its own.")
            for need in stage.needs or ():
                if need not in self.names[:index]:
                    raise ValueError(f"stage {stage.name!r} needs {need!r}, which is no stage before it.")
            for output in stage.outputs:
                if self.root not in output.parents:
                    raise ValueError(
                        f"stage {stage.name!r} leaves {output}, which is not in the study's folder {self.root}."
                    )

    def needs(self, stage: Stage) -> tuple[str, ...]:
        return self.names[: self.names.index(stage.name)] if stage.needs is None else stage.needs


class Step(NamedTuple):
    """A stage, its key, and the reason to run it. An empty reason means that it is skipped."""

    stage: Stage
    key: str
    reason: str


def read_study(path: Path, root: Path | None = None) -> Study:
    """The study that a YAML file describes, in `root` or in the folder that it says.

    Configs are named relative to the study's file, outputs relative to its root. A study of the first edition says
    `folder` in place of `root`, and names both relative to the current folder.
    Raises FileNotFoundError and ValueError, in a sentence, when the file describes no study.
    """
    values = read_mapping(path)
    is_first_edition = "folder" in values and "root" not in values
    says_root = "folder" if is_first_edition else "root"
    _check_keys(values, (says_root, "stages"), path, required=(says_root, "stages"))
    if is_first_edition and root is not None:
        raise ValueError(
            f"{path} says `folder:`, and its outputs are relative to the current folder, so --root cannot move them; "
            "say `root:` in its place, and outputs relative to that."
        )
    root = root or study_root(path, values)
    assert root is not None
    config_base, output_base = (Path(), Path()) if is_first_edition else (path.parent, root)
    stages = []
    for entry in values["stages"]:
        known = tuple(Stage.__dataclass_fields__)
        if not isinstance(entry, dict):
            raise ValueError(f"{path} has the stage {entry!r}; expected a mapping with the keys {', '.join(known)}.")
        _check_keys(entry, known, path, required=("name", "command", "config", "outputs"))
        if entry["command"] not in get_args(Command):
            raise ValueError(f"{path}: {unknown_key(str(entry['command']), get_args(Command), 'a stage', 'command')}")
        named = folders(path, root)
        stages.append(
            Stage(
                str(entry["name"]),
                entry["command"],
                _place(entry["config"], config_base, named, path),
                tuple(_place(output, output_base, named, path) for output in entry["outputs"]),
                None if entry.get("needs") is None else tuple(entry["needs"]),
            )
        )
    return Study(root, tuple(stages))


def _place(said: Any, base: Path, named: dict[str, str], source: Path) -> Path:
    """A path as it is said, relative to `base` unless it says a folder itself."""
    text = str(substitute(str(said), named, str(source)))
    return Path(text) if text != said else base / text


def plan(study: Study, force: Collection[str] = ()) -> Iterator[Step]:
    """What to do about each stage, told when its turn comes: a stage that has just run counts as complete."""
    keys: dict[str, str] = {}
    for stage in study.stages:
        needs = study.needs(stage)
        keys[stage.name] = stage_key(stage, [keys[name] for name in needs], study.root)
        yield Step(stage, keys[stage.name], _reason(study, stage, keys[stage.name], force))


def stage_key(stage: Stage, upstream: list[str], root: Path) -> str:
    """A hash of all that a stage's result depends on: command, config, the input files it names, and upstream keys.

    The config counts as it is written, so that a study stays complete when its folder is moved. Inputs are its values
    that name a file or a model folder outside of the study's own folder; of these the content counts.
    """
    config = read_mapping(stage.config)
    found = _inputs(config, folders(stage.config, root), stage.config, root.resolve())
    inputs = {said: content_hash(path) for said, path in sorted(dict(found).items())}
    return hash_json({"command": stage.command, "config": config, "inputs": inputs, "upstream": upstream})


def _reason(study: Study, stage: Stage, key: str, force: Collection[str]) -> str:
    before = recorded(study.root).get(stage.name)
    if stage.name in force or "all" in force:
        return "forced"
    if before is None:
        return "not run yet"
    anew = [name for name, run in runs_of(study, stage).items() if before["upstream"].get(name) != run]
    if anew:
        return f"{', '.join(anew)} ran anew"
    if before["key"] != key:
        return "its config or input has changed"
    if before["status"] != "complete":
        return "was interrupted"
    absent = [str(output) for output in stage.outputs if not output.exists()]
    return f"{absent[0]} is missing" if absent else ""


def runs_of(study: Study, stage: Stage) -> dict[str, str]:
    """Which run of each stage that `stage` needs is the latest; keys alone do not tell a stage that was forced."""
    runs = recorded(study.root)
    return {name: runs.get(name, {}).get("run", "") for name in study.needs(stage)}


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / RECORD
    if not path.exists():
        return {}
    values = read_json(path)
    if not isinstance(values, dict) or not all(
        isinstance(v, dict) and {"key", "status", "run", "upstream"} <= set(v) for v in values.values()
    ):
        raise ValueError(f"{path} is not a study's record; remove it to run every stage again.")
    return values


def _check_keys(values: dict[str, Any], known: tuple[str, ...], path: Path, required: tuple[str, ...]) -> None:
    for key in values:
        if key not in known:
            raise ValueError(unknown_key(str(key), known, str(path)))
    for key in required:
        if key not in values:
            raise ValueError(f"{path} lacks the key {key!r}; it takes {', '.join(known)}.")


def _inputs(value: Any, named: dict[str, str], config: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """The inputs that a config's values name, as they are said and where they are."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _inputs(part, named, config, root)
    elif isinstance(value, str) and 0 < len(value) < 1024:
        said = value.removeprefix("local-dir:")
        path = weights_folder(substitute(said, named, str(config)))
        inside = root in (path.resolve(), *path.resolve().parents)
        is_model = path.is_dir() and any(
            (path / name).is_file() for name in ("model_index.json", "open_clip_config.json")
        )
        if not inside and (path.is_file() or is_model):
            yield str(Path(said)), path


def content_hash(path: Path) -> str:
    """Of a file, or of a folder's files by name, its model card apart: size and content, of large files the ends."""
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if _counts(file.relative_to(path))]
    return hash_of_ends((file.relative_to(path).as_posix(), file) for file in files if file.is_file())


def _counts(file: Path) -> bool:
    return file.suffix != ".md" and not any(part.startswith(".") for part in file.parts)
