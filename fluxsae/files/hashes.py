"""Hashes of files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

ENDS = 1 << 20
"""Bytes hashed at either end of a file of more than twice as many."""


def sha256_file(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of_ends(files: Iterable[tuple[str, Path]]) -> str:
    """One hash of named files, in the order given: of each the name, the size, and the first and last MiB.

    Reading 24 GB of weights to name them would take longer than many captures.
    """
    digest = hashlib.sha256()
    for name, path in files:
        size = path.stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(ENDS, size - ENDS))
            digest.update(file.read(ENDS))
    return digest.hexdigest()
