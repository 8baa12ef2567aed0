"""Config files that say their folders by name: `${root}` is the study's folder, `${here}` the config file's own.

A study says its root once, in `study.yaml`. A config beside it finds it there, so it can be run alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fluxsae.files import read_yaml, unknown_key

STUDY_FILE = "study.yaml"
_PLACEHOLDER = re.compile(r"(\$?)\$\{([^{}]*)\}")


def read_mapping(path: Path) -> dict[str, Any]:
    """What a config file says, as it is written. FileNotFoundError and ValueError when it is none."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no keys; expected a YAML mapping.")
    return values


def read_config(path: Path, root: Path | None = None) -> dict[str, Any]:
    """What a config file says, with the folders in place of their names.

    Args:
        path: the config file.
        root: the study's folder; by default that of the `study.yaml` beside the file.

    Raises FileNotFoundError when there is no such file, and ValueError when it names another folder than `${here}` and
    `${root}`, or `${root}` when nothing says what that is.
    """
    values: dict[str, Any] = substitute(read_mapping(path), folders(path, root), str(path))
    return values


def folders(path: Path, root: Path | None = None) -> dict[str, str]:
    """The folders that the config file `path` can name."""
    root = root or root_beside(path)
    return {"here": str(path.parent)} | ({"root": str(root)} if root is not None else {})


def root_beside(path: Path) -> Path | None:
    """The root that the `study.yaml` in a config file's folder says; None where there is none that says one."""
    study = path.with_name(STUDY_FILE)
    return study_root(study, read_mapping(study)) if study.is_file() else None


def study_root(path: Path, values: Mapping[str, Any]) -> Path | None:
    """The root that a study says, relative to the current folder; a study of the first edition calls it `folder`."""
    said = values.get("root", values.get("folder"))
    return None if said is None else Path(substitute(str(said), {"here": str(path.parent)}, str(path)))


def names_root(value: Any) -> bool:
    """Whether a config's values depend on where the study's folder is."""
    return any(name == "root" for text in _texts(value) for escape, name in _PLACEHOLDER.findall(text) if not escape)


def substitute(value: Any, named: Mapping[str, str], source: str) -> Any:
    """`value` with each `${name}` in its texts replaced; `$${` stands for `${`. ValueError for an unknown name."""

    def place(match: re.Match[str]) -> str:
        escape, name = match.groups()
        if escape:
            return match[0][1:]
        if name in named:
            return named[name]
        if name == "root":
            raise ValueError(
                f"{source} says ${{root}}, and no {STUDY_FILE} beside it says what the root is; "
                "add --root and the study's folder."
            )
        known = ("here", "root")
        raise ValueError(
            f"{source}: {unknown_key(name, known, 'a config', 'folder')}; "
            f"write ${{here}} or ${{root}}, and $${{{name}}} for the text itself."
        )

    if isinstance(value, dict):
        return {key: substitute(part, named, source) for key, part in value.items()}
    if isinstance(value, list):
        return [substitute(part, named, source) for part in value]
    return _PLACEHOLDER.sub(place, value) if isinstance(value, str) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, str):
        yield value
