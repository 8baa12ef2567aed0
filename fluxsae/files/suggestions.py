"""What was probably meant by a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_key(key: str, known: Iterable[str], owner: str, what: str = "key") -> str:
    """`unknown key 'hieght' of FluxCapture: did you mean 'height'?`, or all the known ones when none is near."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"unknown {what} {key!r} of {owner}: did you mean {near[0]!r}?"
    return f"unknown {what} {key!r} of {owner}" + (f", which knows {', '.join(known)}" if known else "")
