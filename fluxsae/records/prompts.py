"""Reads prompt files: text, JSON lines or CSV, with the attributes that a prompt may carry."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fluxsae.files import hash_json

Row = tuple[int, str, Mapping[str, Any]]


class Prompt(NamedTuple):
    """A prompt, its position in the file, and attributes of the scene, such as `{"background": "blue"}`."""

    id: int
    text: str
    attributes: dict[str, str]


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts in a file, in order.

    A `.txt` file holds one prompt a line. A `.jsonl` file holds one object a line, with "prompt"; other keys are
    attributes. A `.csv` file has a column "prompt"; other columns are attributes. Blank lines are skipped, and empty
    attributes are left out.

    Raises FileNotFoundError for a missing file, and ValueError with the line's number when a line has no prompt.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ValueError(f"prompts file {path} has suffix {path.suffix!r}; expected one of {', '.join(_READERS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompts file {path}; name a .txt, .jsonl or .csv file that exists.")
    rows = list(_READERS[path.suffix](path, _text(path)))
    for line, text, extra in rows:
        if not text.strip():
            raise ValueError(f"{path} line {line} holds an empty prompt; write one or remove the line.")
        if not _is_unicode(text + "".join(f"{key}{value}" for key, value in extra.items())):
            raise ValueError(
                f"{path} line {line} holds half of a surrogate pair, which is no text; correct its escapes."
            )
    if not rows:
        raise ValueError(f"{path} holds no prompts; write at least one.")
    return [Prompt(i, text.strip(), _attributes(extra)) for i, (_, text, extra) in enumerate(rows)]


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """A hash of the prompts' texts in order; attributes do not change an image."""
    return hash_json([prompt.text for prompt in prompts])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from error


def _read_text(path: Path, text: str) -> Iterator[Row]:
    # Split at newlines only: str.splitlines would also cut a prompt at form feeds and Unicode separators.
    for line, prompt in enumerate(text.split("\n"), 1):
        if prompt.strip():
            yield line, prompt, {}


def _read_jsonl(path: Path, text: str) -> Iterator[Row]:
    for line, record in enumerate(text.split("\n"), 1):
        if not record.strip():
            continue
        try:
            values = json.loads(record)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {line} is not JSON ({error}); write one object a line.") from error
        if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
            raise ValueError(f'{path} line {line} has no text under "prompt"; write {{"prompt": "a small fox"}}.')
        prompt, inner = values.pop("prompt"), values.get("attributes")
        # A capture's own copy keeps the attributes in an object of their own.
        yield line, prompt, inner if isinstance(inner, dict) else values


def _read_csv(path: Path, text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if "prompt" not in (reader.fieldnames or ()):
            raise ValueError(f'{path} has the columns {reader.fieldnames or []}, expected one named "prompt".')
        for row in reader:
            if None in row:
                raise ValueError(f"{path} line {reader.line_num} has more fields than the header; quote its commas.")
            yield reader.line_num, row.pop("prompt") or "", row
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num} is not CSV ({error}); correct its quotes.") from error


def shown(text: str, at_most: int = 200) -> str:
    """`text` as terminals and pictures may show it: one line of at most so many characters, in which whatever does not
    print (controls, escapes, changes of direction) is written as Python writes it."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: at_most + 1])
    return line if len(line) <= at_most else f"{line[: at_most - 1]}…"


_READERS = {".txt": _read_text, ".jsonl": _read_jsonl, ".csv": _read_csv}


def _attributes(values: Mapping[str, Any]) -> dict[str, str]:
    words = {str(key): "" if value is None else str(value).strip() for key, value in values.items()}
    return {key: word for key, word in words.items() if word}


def _is_unicode(text: str) -> bool:
    """Whether `text` can be written at all: JSON can escape what UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
