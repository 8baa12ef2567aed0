"""Columns of the features table: what each is called, which kind of values it has, and what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any, Literal, get_args

from fluxsae.files import read_json, remove_parts, write_json

Kind = Literal["bool", "int", "float", "text", "ints"]
Value = bool | int | float | str | tuple[int, ...] | None
RANKING: tuple[Kind, ...] = ("bool", "int", "float")
"""Kinds that features can be ranked by."""

KNOWN: dict[str, Kind] = {
    "feature": "int",
    "alive": "bool",
    "frequency": "float",
    "token_frequency": "float",
    "max": "float",
    "mean_active": "float",
    "std_active": "float",
    "n_images": "int",
    "class": "text",
    "coherence": "float",
    "coherence_null": "float",
    "coherence_rank": "int",
    "label": "text",
    "label_share": "float",
    "top_images": "ints",
}
"""The columns that have the same kind in every table, in the order in which a file holds them before all others.

Tables of the first edition do not say what their columns are.
"""

VERSION = 1


@dataclass(frozen=True)
class Column:
    """A column of the features table, declared by the analysis that fills it in.

    Args:
        name: its name in the file and in `row[name]`.
        kind: the kind of its values: `bool`, `int`, `float`, `text`, or `ints` for a sequence of whole numbers. A value
            of None is unknown.
        meaning: one line for readers of the table.
    """

    name: str
    kind: Kind
    meaning: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"column {self.name!r} is of kind {self.kind!r}; use one of {', '.join(get_args(Kind))}.")
        if KNOWN.get(self.name, self.kind) != self.kind:
            raise ValueError(
                f"column {self.name!r} is declared as {self.kind} but is {KNOWN[self.name]} in every table; "
                "give yours another name."
            )


def encode(column: Column, values: Sequence[Any]) -> list[Any]:
    """The values as `write_columns` takes them; NaN becomes None. ValueError for a value of another kind."""
    for kind in set(map(type, values)) - {type(None)}:
        if not _fits(kind, column.kind):
            example = next(value for value in values if type(value) is kind)
            raise ValueError(
                f"column {column.name!r} is declared as {column.kind} but has the {kind.__name__} {example!r}; "
                "give values of Python, as `.tolist()` makes them, or declare another kind."
            )
    if column.kind == "ints":
        return [None if value is None else " ".join(map(str, value)) for value in values]
    if column.kind == "float":
        return [None if value is None or isnan(value) else float(value) for value in values]
    return list(values)


def decode(column: Column, texts: Sequence[str]) -> list[Value]:
    """The values of a column that was read; unknown numbers are None. ValueError when one is of another kind."""
    parse = _PARSE[column.kind]
    try:
        return [parse(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"column {column.name!r} is of kind {column.kind} but {error}") from error


def as_stored(column: Column, texts: Sequence[str]) -> Sequence[Any]:
    """A column that was read, for writing it again: numbers as numbers, as text with a minus looks like a formula."""
    return encode(column, decode(column, texts)) if column.kind in ("int", "float") else texts


def column_of(name: str, texts: Sequence[str], declared: Mapping[str, Column]) -> Column:
    """What a column is: as declared, as known, or numbers where it holds nothing else, or text."""
    if name in declared:
        return declared[name]
    guessed: Kind = "float" if all(map(_is_number, filter(None, texts))) else "text"
    return Column(name, KNOWN.get(name, guessed), "")


def read_declared(table: Path) -> dict[str, Column]:
    """The columns that the file beside a table declares; none where there is no such file.

    ValueError when it is damaged, or of a newer version.
    """
    path = declarations(table)
    if not path.exists():
        return {}
    values = read_json(path)
    if not isinstance(values, dict) or values.get("version") != VERSION:
        version = values.get("version") if isinstance(values, dict) else None
        raise ValueError(f"{path} is of version {version}, expected {VERSION}; make the table again with this fluxsae.")
    try:
        return {name: Column(name, said["kind"], said["meaning"]) for name, said in values["columns"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} declares no columns ({error}); remove it and make the table again.") from error


def write_declared(table: Path, columns: Iterable[Column]) -> None:
    """Leave beside a table what its columns are."""
    said = {column.name: {"kind": column.kind, "meaning": column.meaning} for column in columns}
    remove_parts(declarations(table))  # of a run that was killed
    write_json(declarations(table), {"version": VERSION, "columns": said})


def declarations(table: Path) -> Path:
    """`features.json` of `features.csv`."""
    return table.with_suffix(".json")


def _fits(given: type, kind: Kind) -> bool:
    if kind == "ints":
        return issubclass(given, Sequence) and not issubclass(given, str)
    if issubclass(given, bool):
        return kind == "bool"
    wanted: dict[Kind, type | tuple[type, ...]] = {"bool": bool, "int": int, "float": (int, float), "text": str}
    return issubclass(given, wanted[kind])


def _truth(text: str) -> bool | None:
    """Spreadsheets write TRUE."""
    truth = {"": None, "true": True, "false": False}
    if text.lower() not in truth:
        raise ValueError(f"holds {text!r}, expected True or False")
    return truth[text.lower()]


def _whole(text: str) -> int | None:
    return int(text) if text else None


def _number(text: str) -> float | None:
    number = float(text) if text else None
    return None if number is None or isnan(number) else number


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_PARSE: dict[Kind, Any] = {
    "bool": _truth,
    "int": _whole,
    "float": _number,
    "text": str,
    "ints": lambda text: tuple(map(int, text.split())),
}
