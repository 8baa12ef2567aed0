"""The long forms of these tests run only when they are asked for: `pytest -m faults`."""

from __future__ import annotations

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("faults") and "faults" not in item.config.getoption("-m"):
        pytest.skip("takes minutes: ask for it with -m faults")
