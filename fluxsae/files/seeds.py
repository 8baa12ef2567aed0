"""Seeds that derive from other numbers."""

from __future__ import annotations

import hashlib


def derived_seed(*parts: int) -> int:
    """The first 63 bits of the SHA-256 of the parts, joined by ":".

    So seeds of neighbouring numbers have nothing to do with one another, and are the same on every machine.
    """
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
