"""JSON files, and records that carry a hash of what they say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxsae.files.whole import write_text


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, keys in their own order, ending in a newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The JSON value in `path`; FileNotFoundError when missing, ValueError naming the file when it does not parse."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it or make it again.") from error


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A record with a `hash` of all that it says, so that a reader sees when a digit has changed."""
    return {**values, "hash": hash_json(values)}


def unsealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `sealed` was given. ValueError when it says something else now; a record without a hash is an older one."""
    inner = {key: value for key, value in values.items() if key != "hash"}
    if "hash" in values and values["hash"] != hash_json(inner):
        raise ValueError("it is damaged: its content does not have the hash that it names")
    return inner


def hash_json(value: Any) -> str:
    """The SHA-256 of a JSON value, the same for any order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
