"""What a command line says: config files, the study's folder, and values of its own.

jsonargparse gets each file's text with folders filled in. It merges values by their place: a callback given in place of
another of its class would keep the other's options. So whatever is given whole is first taken out of the files before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import fluxsae
from fluxsae.files import config_file
from fluxsae.study import names_root, read_config, read_mapping, root_beside, substitute

RENAMED_OPTIONS: dict[str, dict[str, str]] = {"SAETraining": {"revive": "dead_bias_increment"}}
"""Options that had another name in the first edition: for each class the old name and the new."""

_CLASS_PATH = re.compile(r"fluxsae(?:\.\w+)+\.(\w+)")


class ConfigFile(NamedTuple):
    """A config file and what it says, folders filled in."""

    path: Path
    values: dict[str, Any]


class Arguments(NamedTuple):
    """A command line in order: config files, and the words between them."""

    parts: tuple[ConfigFile | str, ...]

    @property
    def files(self) -> list[ConfigFile]:
        return [part for part in self.parts if isinstance(part, ConfigFile)]

    def words(self) -> list[str]:
        """The command line for jsonargparse, which takes a file's text in the file's place."""
        return [part if isinstance(part, str) else f"--config={_text(part)}" for part in self.parts]


def read_arguments(arguments: Sequence[str], root: Path | None = None) -> Arguments:
    """Read the config files of a command line, for the study in `root` or in the folder that `--root` names.

    Otherwise that is what the `study.yaml` beside the first config says that has one beside it.
    Raises FileNotFoundError and ValueError, in a sentence, for a file or folder that cannot be read or is not known.
    """
    words, said = _take_root(list(arguments))
    parts = _take_files(words)
    paths = [part for part in parts if isinstance(part, Path)]
    if said is not None and not any(names_root(read_mapping(path)) for path in paths):
        raise ValueError(
            f"--root is {said}, and nothing in {', '.join(map(str, paths)) or 'the command'} depends on it; "
            "write ${root} where a config names the study's folder."
        )
    root = root or said or next(filter(None, map(root_beside, paths)), None)
    named = {} if root is None else {"root": str(root)}
    read: list[ConfigFile | str] = []
    for part in parts:
        if isinstance(part, Path):
            file = ConfigFile(part, of_this_edition(read_config(part, root)))
            for before in read:
                if isinstance(before, ConfigFile):
                    _take_out(before.values, file.values)
            read.append(file)
        else:
            read.append(_renamed(substitute(part, named, "the command line")))
    _take_out_overridden(read)
    return Arguments(tuple(read))


def of_this_edition(value: Any) -> Any:
    """A config's values with the classes and options of the first edition under the names that they have now."""
    if isinstance(value, list):
        return [of_this_edition(part) for part in value]
    if not isinstance(value, dict):
        return value
    new = {key: of_this_edition(part) for key, part in value.items()}
    if isinstance(new.get("class_path"), str):
        new["class_path"] = _class_path(new["class_path"])
        renamed = RENAMED_OPTIONS.get(new["class_path"].rpartition(".")[2], {})
        if isinstance(new.get("init_args"), dict):
            new["init_args"] = {renamed.get(key, key): part for key, part in new["init_args"].items()}
    return new


def _class_path(path: str) -> str:
    """A class of ours by its name in the package, whatever module it once was in."""
    match = _CLASS_PATH.fullmatch(path)
    return f"fluxsae.{match[1]}" if match and match[1] in fluxsae.__all__ else path


def _renamed(word: str) -> str:
    """A word of the command line, `--key=value` or either, with the names of this edition."""
    head, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    for renamed in RENAMED_OPTIONS.values():
        stem, dot, name = head.rpartition(".")
        head = f"{stem}{dot}{renamed.get(name, name)}"
    return f"{head}{equals}{_class_path(value)}"


def _take_root(words: list[str]) -> tuple[list[str], Path | None]:
    """The words without `--root DIR`, and DIR."""
    kept, root = [], None
    while words:
        word = words.pop(0)
        if word == "--root":
            if not words or words[0].startswith("-"):
                raise ValueError("--root names no folder; write --root and the study's folder.")
            root = Path(words.pop(0))
        elif word.startswith("--root="):
            root = Path(word.removeprefix("--root="))
        else:
            kept.append(word)
    return kept, root


def _take_files(words: list[str]) -> list[Path | str]:
    """The words with a path in place of each `-c FILE`."""
    parts: list[Path | str] = []
    while words:
        word = words.pop(0)
        if word in ("-c", "--config"):
            if not words:
                raise ValueError(f"{word} names no file; write {word} and a config file, such as {word} topk.yaml.")
            parts.append(config_file(words.pop(0)))
        elif word.startswith("--config="):
            parts.append(config_file(word.removeprefix("--config=")))
        else:
            parts.append(word)
    return parts


def _take_out_overridden(parts: Sequence[ConfigFile | str]) -> None:
    """Take out of the files what a later word gives whole: `--trainer.callbacks X`, not `--trainer.callbacks+=X`."""
    for index, word in enumerate(parts):
        if isinstance(word, str) and word.startswith("--"):
            key = word[2:].partition("=")[0].removesuffix(".class_path")
            for file in parts[:index]:
                if isinstance(file, ConfigFile) and key != "trainer":  # which takes a file to complete it
                    holder = _holder(file.values, key)
                    if holder is not None:
                        del holder[key.split(".")[-1]]


def _holder(values: Any, key: str) -> dict[str, Any] | None:
    """The mapping in `values` that holds the last name of `key`, if any; `key` may leave out `init_args`."""
    name, _, rest = key.partition(".")
    if not isinstance(values, dict):
        return None
    if name not in values:
        return _holder(values.get("init_args"), key)
    return _holder(values[name], rest) if rest else values


def _take_out(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Take out of a file's values the lists and classes that a later file replaces; other mappings complete each other.

    A single value needs no taking out: jsonargparse keeps nothing of it.
    """
    for key, value in after.items():
        old = before.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and _same_class(old, value):
            _take_out(old, value)
        elif isinstance(old, dict | list):
            del before[key]


def _same_class(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return "class_path" not in new or new["class_path"] == old.get("class_path")


def _text(file: ConfigFile) -> str:
    return str(yaml.safe_dump(file.values, sort_keys=False, allow_unicode=True, width=2**20))
