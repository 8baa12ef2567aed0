"""A file that is filled row by row."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Trainer

from fluxsae.runtime import shared_array as arrays


def test_what_the_disk_takes_early_is_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    advise = os.posix_fadvise
    monkeypatch.setattr(arrays, "_AT_ONCE", 2 * 3 * 4)
    monkeypatch.setattr(os, "posix_fadvise", lambda *how: asked.append(how[-1]) or advise(*how))  # type: ignore[func-returns-value]
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    path, expected = tmp_path / "rows.npy", np.arange(15, dtype=np.float32).reshape(5, 3)
    array = arrays.SharedArray(trainer, path, (5, 3))
    for rows in ([3], [0, 1], [4], [2]):
        array.write(np.array(rows), expected[rows])
        assert not path.exists()
    assert array.n_written(trainer) == 5 and asked == [os.POSIX_FADV_DONTNEED] * 2
    array.finish()
    assert np.array_equal(np.load(path), expected)
