"""Whatever happens to a set's files: an error that names the file, the right data, or a problem told by verify."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.faults.damage import FAULTS
from tests.faults.fuzz import Original, cases, originals


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Original]:
    return originals(tmp_path_factory.mktemp("sets"))


def test_damaged_sets(sets: list[Original]) -> None:
    done = list(cases(sets, 14 * len(FAULTS)))
    assert [case.failure for case in done if case.failure] == []
    outcomes = Counter(case.outcome for case in done)
    assert outcomes["refused"] > 50 and outcomes["found by verify"] > 0  # the faults reach what they are meant for


@pytest.mark.faults
def test_many_damaged_sets(sets: list[Original]) -> None:
    assert [case.failure for case in cases(sets, 2000, seed=1) if case.failure] == []
