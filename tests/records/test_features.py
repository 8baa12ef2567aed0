"""The features table keeps what it is given, in the kinds that are declared, and ranks by any number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxsae.records.columns import KNOWN, Column, Kind, decode, encode
from fluxsae.records.features import Selection, read_features, read_table, update_features

FIRST_EDITION = Path(__file__).parents[1] / "fixtures" / "first_edition" / "features.csv"
VALUES: dict[Kind, st.SearchStrategy[Any]] = {
    "bool": st.booleans(),
    "int": st.integers(),
    "float": st.floats(-1e6, 1e6),
    "text": st.text(),
    "ints": st.lists(st.integers(0, 10**6)),
}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "features.csv"
    declared = [
        Column("gini", "float", "how unevenly S is spread"),
        Column("note", "text", ""),
        Column("odd", "bool", ""),
    ]
    update_features(path, {"alive": [True, True, False, True], "top_images": ["3 1", "", "2", "0"]})
    update_features(
        path,
        {"gini": [0.5, float("nan"), 0.9, 0.7], "note": ["=1+1", "", "x", None], "odd": [False, True] * 2},
        declared,
    )
    return path


@given(st.data(), st.sampled_from(sorted(VALUES)))
def test_a_column_is_read_as_it_was_declared(tmp_path_factory: Any, data: st.DataObject, kind: Kind) -> None:
    values = data.draw(st.lists(VALUES[kind] | st.none(), min_size=1, max_size=5))
    path = tmp_path_factory.mktemp("table") / "features.csv"
    update_features(path, {"mine": values}, [Column("mine", kind, "of a test")])
    empty: Any = {"text": "", "ints": ()}.get(kind)
    expected = [empty if value is None else tuple(value) if kind == "ints" else value for value in values]
    found = [row["mine"] for row in read_features(path)]
    assert found == [value if not isinstance(value, float) else pytest.approx(value, rel=1e-8) for value in expected]
    assert all(type(a) is type(b) for a, b in zip(found, expected, strict=True))


def test_rows_have_attributes_and_any_column(table: Path) -> None:
    rows = read_features(table)
    assert [row.top_images for row in rows] == [(3, 1), (), (2,), (0,)]
    assert [row["gini"] for row in rows] == [0.5, None, 0.9, 0.7] and rows[0]["note"] == "=1+1"
    assert rows[0].coherence is None and rows[0].label == ""
    with pytest.raises(KeyError, match="unknown column 'ginny' of this features table: did you mean 'gini'"):
        rows[0]["ginny"]


def test_what_is_declared_stays_when_others_add_columns(table: Path) -> None:
    update_features(table, {"max": [1.0, 2.0, 3.0, 4.0]}, [Column("max", "float", "largest score")])
    said = json.loads(table.with_suffix(".json").read_text())
    assert said["version"] == 1 and list(said["columns"]) == ["max", "gini", "note", "odd"]
    assert said["columns"]["gini"] == {"kind": "float", "meaning": "how unevenly S is spread"}
    assert list(read_table(table).columns) == ["feature", "alive", "max", "top_images", "gini", "note", "odd"]


def test_a_new_table_forgets_what_an_earlier_one_was_said_to_hold(table: Path) -> None:
    table.unlink()
    update_features(table, {"max": [1.0]}, [Column("max", "float", "largest score")])
    assert list(json.loads(table.with_suffix(".json").read_text())["columns"]) == ["max"]


def test_any_number_ranks(table: Path) -> None:
    def ranked(by: str, **more: Any) -> list[int]:
        return [row.feature for row in Selection(table, rank_by=by, **more).rows()]

    assert ranked("gini") == [3, 0]  # 2 is dead, 1 has none
    assert ranked("gini", ascending=True) == [0, 3]
    assert ranked("odd") == [1, 3, 0] and ranked("odd", n_features=1) == [1]  # equal ones in index order
    assert ranked("feature") == [0, 1, 3]
    for by in ("note", "top_images"):
        with pytest.raises(ValueError, match=f"'{by}', a column of kind .* has feature, alive, gini, odd to rank by"):
            ranked(by)
    with pytest.raises(
        ValueError, match=r"no alive feature with a value in column 'ginny'.*: feature, alive, gini, odd"
    ):
        ranked("ginny")


@pytest.mark.parametrize(
    ("kind", "value"),
    [("int", 1.5), ("int", True), ("bool", 1), ("float", "1"), ("text", 1), ("ints", "1 2"), ("ints", 3)],
)
def test_a_value_of_another_kind_is_refused(tmp_path: Path, kind: Kind, value: object) -> None:
    with pytest.raises(ValueError, match=f"'mine' is declared as {kind} but has the {type(value).__name__}"):
        update_features(tmp_path / "features.csv", {"mine": [value, None]}, [Column("mine", kind, "")])
    assert not list(tmp_path.iterdir())


def test_columns_that_cannot_be(table: Path) -> None:
    before = table.read_text()
    with pytest.raises(ValueError, match="'label' is declared as float but is text in every table"):
        Column("label", "float", "")
    with pytest.raises(ValueError, match="'feature' is the number of a row"):
        update_features(table, {"feature": [4, 3, 2, 1]})
    with pytest.raises(ValueError, match=r"has 2 values but .* has 4 features"):
        update_features(table, {"mine": [1, 2]})
    assert table.read_text() == before


def test_a_table_of_the_first_edition_has_kinds_too(tmp_path: Path) -> None:
    table = read_table(FIRST_EDITION)
    assert {name: column.kind for name, column in table.columns.items()}.items() <= KNOWN.items()
    assert table.rows[0]["class"] == "common" and table.rows[1].top_images == (0, 4, 3)
    path = tmp_path / "features.csv"
    path.write_text("feature,alive,mine,yours\n0,TRUE,1.5,a\n1,FALSE,,2\n")
    mine, yours = (read_table(path).columns[name].kind for name in ("mine", "yours"))
    assert (mine, yours) == ("float", "text") and [row.alive for row in read_features(path)] == [True, False]


@pytest.mark.parametrize("row", ["x,True", ",True", "0,maybe", "0"])
def test_a_damaged_table_is_refused(tmp_path: Path, row: str) -> None:
    path = tmp_path / "features.csv"
    path.write_text(f"feature,alive\n{row}\n")
    with pytest.raises(ValueError, match=r"features.csv has .*make (the table|it) again"):
        read_features(path)


@pytest.mark.parametrize(
    "text", ["[]", '{"version": 2}', '{"version": 1}', '{"version": 1, "columns": {"a": {}}}', "{"]
)
def test_damaged_declarations_are_refused(table: Path, text: str) -> None:
    table.with_suffix(".json").write_text(text)
    with pytest.raises(ValueError, match=r"features\.json"):
        read_features(table)


def test_numbers_of_a_list_are_told_apart_from_text() -> None:
    column = Column("top_images", "ints", "")
    assert encode(column, [(1, 2), [], None]) == ["1 2", "", None] and decode(column, ["1 2", ""]) == [(1, 2), ()]


def test_what_a_killed_run_left_half_written_goes(table: Path) -> None:
    parts = [table.with_name(f".features-0123abcd{suffix}") for suffix in (".csv", ".json")]
    for part in parts:
        part.touch()
    update_features(table, {"max": [1.0] * 4}, [Column("max", "float", "largest score")])
    assert not any(part.exists() for part in parts)


def test_numbers_stay_numbers_when_a_later_analysis_writes(tmp_path: Path) -> None:
    """Text that begins with a minus gets an apostrophe, which other readers would not take for a number."""
    table = tmp_path / "features.csv"
    update_features(table, {"coherence": [-0.021, 0.5, None], "gini": [-1.5, 2.0, 3.0]})
    first = table.read_text()
    update_features(table, {"label": ["-a", "", "b"]})
    assert "-0.021" in first and "'-0.021" not in table.read_text() and "'-1.5" not in table.read_text()
    assert [row.coherence for row in read_features(table)] == [-0.021, 0.5, None]
    assert [row.label for row in read_features(table)] == ["-a", "", "b"]
