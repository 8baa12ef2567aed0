"""Files that are whole or absent, and records that tell when they have changed."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fluxsae.files.json_files import read_json, sealed, unsealed, write_json
from fluxsae.files.tables import read_columns, read_csv, write_columns, write_csv
from fluxsae.files.whole import remove_parts, whole_file


def test_a_sealed_record_tells_a_changed_digit(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", sealed({"mean": [0.1, 2.5e-7], "n": 3}))
    values = read_json(tmp_path / "a.json")
    assert unsealed(values) == {"mean": [0.1, 2.5e-7], "n": 3}
    assert unsealed({"n": 3}) == {"n": 3}  # of before records had one
    with pytest.raises(ValueError, match="does not have the hash"):
        unsealed({**values, "n": 4})


def test_json_that_is_nested_too_deeply_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_parts_of_one_file_are_removed_and_no_others(tmp_path: Path) -> None:
    parts = []
    for name in ("top.json", "top-1.json", "top.csv"):
        with whole_file(tmp_path / name) as temporary:
            temporary.write_text(json.dumps(name))
            parts.append(tmp_path / temporary.name)
    for part in parts:
        part.write_text("left by a process that was killed")
    remove_parts(tmp_path / "top.json")
    assert [part.exists() for part in parts] == [False, True, True]
    assert json.loads((tmp_path / "top.json").read_text()) == "top.json"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_mode_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", 1)
        with whole_file(tmp_path / "a.safetensors") as temporary:
            save_file({"x": torch.zeros(3)}, temporary)
        with whole_file(tmp_path / "a.png") as temporary:
            Image.new("RGB", (2, 2)).save(temporary)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_columns_and_rows_are_the_same_table(tmp_path: Path) -> None:
    columns = {"a": [1, 2.5e-9, None], "b": ["=SUM(A1)", "x,\ny", "it's"]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    write_columns(tmp_path / "columns.csv", columns)
    write_csv(tmp_path / "rows.csv", rows, list(columns))
    assert (tmp_path / "columns.csv").read_bytes() == (tmp_path / "rows.csv").read_bytes()
    found = read_columns(tmp_path / "rows.csv")
    assert found == {"a": ["1", "2.5e-09", ""], "b": ["=SUM(A1)", "x,\ny", "it's"]}
    assert read_csv(tmp_path / "rows.csv") == [
        dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)
    ]


def test_a_row_that_was_cut_short_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n\n3\n")
    with pytest.raises(ValueError, match=r"a\.csv has a row of 1 fields, expected 2: \['3'\]"):
        read_columns(tmp_path / "a.csv")


def test_a_table_holds_any_text(tmp_path: Path) -> None:
    values = ["\r", "a\rb", "\n", "a\r\nb", '"', "'", ",", "=1", ""]
    write_columns(tmp_path / "table.csv", {"number": range(len(values)), "text": values})
    assert read_columns(tmp_path / "table.csv")["text"] == values
    assert [row["text"] for row in read_csv(tmp_path / "table.csv")] == values
