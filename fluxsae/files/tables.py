"""CSV tables, every field as text, safe to open in a spreadsheet."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxsae.files.whole import whole_file

_FORMULA = frozenset("=+-@\t\r'")


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write `rows` under a header of `columns`; floats with 9 significant digits, None as an empty field.

    A text that a spreadsheet would run as a formula gets a leading apostrophe, which reading removes.
    """
    _write_fields(path, columns, ([_field(row.get(column)) for column in columns] for row in rows))


def write_columns(path: str | Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of one length as `write_csv` writes rows; long tables are written several times faster so."""
    _write_fields(path, list(columns), zip(*(map(_field, values) for values in columns.values()), strict=True))


def _write_fields(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        quoting = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for row in (header, *rows):
            # Python before 3.13 leaves a carriage return without quotes, and reads it as the end of a line.
            (quoting if any("\r" in field for field in row) else writer).writerow(row)


def read_columns(path: str | Path) -> dict[str, list[str]]:
    """The columns of a CSV file with a header, every value as text.

    FileNotFoundError when it is missing, ValueError when a row is longer or shorter than the header.
    """
    header, rows = _read_fields(path)
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path} has a row of {len(row)} fields, expected {len(header)}: {row}; make it again.")
    return {name: [_unquote(row[i]) for row in rows] for i, name in enumerate(header)}


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header, every value as text. FileNotFoundError when it is missing."""
    header, rows = _read_fields(path)
    if any(len(row) != len(header) for row in rows):  # a damaged file
        with Path(path).open(newline="", encoding="utf-8") as file:
            return [{key: _unquote(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return [dict(zip(header, map(_unquote, row), strict=True)) for row in rows]


def _read_fields(path: str | Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows, as they are stored, but for blank lines."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        header, *rows = [row for row in csv.reader(file) if row] or [[]]
    return header, rows


def _field(value: Any) -> str:
    if isinstance(value, str):
        return "'" + value if value[:1] in _FORMULA else value
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.9g}"
    return str(value)


def _unquote(value: str) -> str:
    return value[1:] if value and value[0] == "'" else value
