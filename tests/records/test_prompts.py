"""Prompt files, right and wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxsae.records.prompts import Prompt, _read_jsonl, prompts_hash, read_prompts, shown


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "\ufeffa fox\r\n\n  an owl, \x0c blue \u2028 sky \n")
    assert read_prompts(path) == [Prompt(0, "a fox", {}), Prompt(1, "an owl, \x0c blue \u2028 sky", {})]


def test_json_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path, "p.jsonl", '{"prompt": "a fox", "size": "small", "place": "", "n": 2, "x": null}\n\n{"prompt": "b"}'
    )
    assert read_prompts(path) == [Prompt(0, "a fox", {"size": "small", "n": "2"}), Prompt(1, "b", {})]


def test_csv(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", 'prompt,background\n"a fox, ""red""\nand more",blue\nan owl,\n')
    assert read_prompts(path) == [Prompt(0, 'a fox, "red"\nand more', {"background": "blue"}), Prompt(1, "an owl", {})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "holds no prompts; write at least one"),
        ("p.txt", "\n  \n", "holds no prompts"),
        ("p.txt", b"\xff\xfe\x00", "is not UTF-8 text .* at byte 0"),
        ("p.yaml", "a", "has suffix '.yaml'; expected one of .txt, .jsonl, .csv"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', "line 2 is not JSON"),
        ("p.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("p.jsonl", '{"prompt": ["a"]}', 'line 1 has no text under "prompt"'),
        ("p.jsonl", '"a"', 'line 1 has no text under "prompt"'),
        ("p.jsonl", '{"prompt": " "}', "line 1 holds an empty prompt"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "line 1 holds half of a surrogate pair"),
        ("p.jsonl", '{"prompt": "a", "b": "\\udfff"}', "line 1 holds half of a surrogate pair"),
        ("p.csv", "", r'has the columns \[\], expected one named "prompt"'),
        ("p.csv", "text\na\n", r"has the columns \['text'\]"),
        ("p.csv", "prompt\n", "holds no prompts"),
        ("p.csv", "prompt,b\n,c\n", "line 2 holds an empty prompt"),
        ("p.csv", "prompt\na, b\n", "line 2 has more fields than the header"),
        ("p.csv", 'prompt\n"a', "is not CSV"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(write(tmp_path, name, content))
    assert "\n" not in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no prompts file .*absent.txt"):
        read_prompts(tmp_path / "absent.txt")


def test_the_hash_is_of_texts_in_order() -> None:
    a, b = Prompt(0, "a", {}), Prompt(1, "b", {"size": "small"})
    assert prompts_hash([a, b]) == prompts_hash([a, b._replace(attributes={})])
    assert len({prompts_hash(prompts) for prompts in ([a, b], [b, a], [a], [Prompt(0, "ab", {})])}) == 4


@given(st.text().filter(lambda text: text.strip() != ""))
def test_any_text_survives_json_lines(text: str) -> None:
    rows = list(_read_jsonl(Path("p.jsonl"), json.dumps({"prompt": text}) + "\n"))
    assert rows == [(1, text, {})]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a fox, 狐狸 🦊", "a fox, 狐狸 🦊"),
        ("two\nlines\t\r", "two\\nlines\\t\\r"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("\u202eright to left", "\\u202eright to left"),
        ("a" * 10_000, "a" * 199 + "…"),
        ("\x1b" * 300, "\\x1b" * 49 + "\\x1…"),
        ("", ""),
    ],
)
def test_shown_text_is_one_line_that_prints(text: str, line: str) -> None:
    assert shown(text) == line and len(line) <= 200
