"""YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: Path) -> Any:
    """What a config file holds. FileNotFoundError when it is missing, ValueError when it is no YAML."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path}: name one, such as configs/tiny/study.yaml.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML ({' '.join(str(error).split())}).") from error
