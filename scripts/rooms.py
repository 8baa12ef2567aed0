"""Prints the rooms of the package, floor by floor: what each imports, how long it is. `python -m scripts.rooms`.

A room is a package or module at the top of `fluxsae/`. Rooms on one floor do not import each other; a room stands one
floor above the highest room that it imports. Imports inside functions count.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grimp

PACKAGE = "fluxsae"
ENTRANCES = {"__main__"}
"""Modules that only start the command."""


def imports_of_rooms() -> dict[str, set[str]]:
    """For each room, the rooms that its modules import."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    rooms = {child.removeprefix(f"{PACKAGE}.") for child in graph.find_children(PACKAGE)} - ENTRANCES
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for module in graph.modules:
        room = _room(module)
        if room in found:
            imported = {_room(other) for other in graph.find_modules_directly_imported_by(module)}
            found[room] |= {other for other in imported if other in found and other != room}
    return found


def floors(imports: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each room, from 1. ValueError naming the rooms that import each other in a circle."""
    found: dict[str, int] = {}
    while len(found) < len(imports):
        ready = [room for room in imports if room not in found and imports[room] <= set(found)]
        if not ready:
            raise ValueError(
                f"these rooms import each other in a circle: {', '.join(sorted(set(imports) - set(found)))}"
            )
        found |= {room: 1 + max((found[other] for other in imports[room]), default=0) for room in ready}
    return found


def main() -> int:
    imports = imports_of_rooms()
    floor = floors(imports)
    for room in sorted(imports, key=lambda room: (floor[room], room)):
        n_files, n_lines = _size(room)
        below = ", ".join(sorted(imports[room], key=lambda other: (floor[other], other))) or "–"
        print(f"{floor[room]:>2}  {room:<10} {n_files:>3} files {n_lines:>6} lines   imports {below}")
    total = sum(_size(room)[1] for room in imports)
    print(f"{len(imports)} rooms on {max(floor.values())} floors, {total} lines, no circle")
    return 0


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _size(room: str) -> tuple[int, int]:
    """How many Python files and lines a room has."""
    path = Path(PACKAGE) / room
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return len(files), sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


if __name__ == "__main__":
    sys.exit(main())
