"""The documentation names what exists: public names, files, and no more than a page of README."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import fluxsae

ROOT = Path(__file__).parents[1]
README_LINES = 150
NOT_IN_THE_REPOSITORY = {"fluxsae/figures/strength.py", "tests/figures/test_strength.py"}
"""Files that CONTRIBUTING.md tells the reader to write."""
NAMED = re.compile(r"`((?:fluxsae|tests|configs|scripts|benchmarks)/[\w./-]*)`")
IN_A_COMMAND = re.compile(r"(?<![\w/{}.-])((?:tests|configs|scripts|benchmarks)/[\w./-]*\w)")
ROOM = re.compile(
    r"`((?:capture|cli|data|figures|files|kernels|models|records|runtime|sae|scoring|shards|steering|study|training)/[\w/]+(?:\.py|/))`"
)


def pages() -> list[Path]:
    """All pages but the log and the changelog, which tell of files that are gone."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if page.name not in ("log.md", "changelog.md")]


def paths_named(text: str) -> Iterator[str]:
    """Paths in backticks, and those in blocks of commands."""
    yield from NAMED.findall(text)
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL):
        yield from IN_A_COMMAND.findall(block)


def test_every_public_name_has_one_place_in_the_api_reference() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    assert Counter(re.findall(r"^::: fluxsae\.(\w+)$", text, re.MULTILINE)) == Counter(fluxsae.__all__)


def test_the_readme_fits_a_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    absent = [path for path in paths_named(text) if not (ROOT / path).exists()]
    assert not set(absent) - NOT_IN_THE_REPOSITORY
    if page.name == "architecture.md":  # which names files as in their rooms
        in_rooms = ROOM.findall(text)
        assert len(in_rooms) > 20
        assert not [path for path in in_rooms if not (ROOT / "fluxsae" / path).exists()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see `fluxsae/nowhere.py` and `tests/`", ["fluxsae/nowhere.py", "tests/"]),
        ("```bash\nfluxsae fit -c configs/tiny/gone.yaml\n```", ["configs/tiny/gone.yaml"]),
        ("`my-study/topk.yaml`, https://github.com/x/tests/y", []),
    ],
)
def test_paths_are_found(text: str, expected: list[str]) -> None:
    assert list(paths_named(text)) == expected
