"""A shard's tar: memory-mapped, its members found by hopping from header to header."""

from __future__ import annotations

import io
import mmap
import os
import re
from pathlib import Path
from typing import NamedTuple

_BLOCK = 512


class Member(NamedTuple):
    """Where a member's bytes lie in its tar."""

    name: str
    start: int
    size: int


class File:
    """A file that is open for as long as somebody has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if "fd" in self.__dict__:
            os.close(self.fd)


class Tar(NamedTuple):
    """A shard: mapped, to find what it holds, and open, to read much at once."""

    map: mmap.mmap
    file: File


def open_tar(path: Path, n_bytes: int) -> Tar:
    """Open a tar of a known size. FileNotFoundError if it is missing, ValueError if its size differs."""
    tar = map_tar(path)
    if len(tar) != n_bytes:
        where = _last_member(tar, path)
        raise ValueError(f"{path} has {len(tar)} bytes, expected {n_bytes} ({where}); restore it or capture again.")
    return Tar(tar, File(path))


def map_tar(path: Path) -> mmap.mmap:
    """A tar mapped into memory, copy-on-write: torch takes only writable buffers, and nothing here reaches the file.

    FileNotFoundError when it is missing, ValueError when it is empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; restore it or capture again.")
    with path.open("rb") as file:
        if file.seek(0, io.SEEK_END) == 0:
            raise ValueError(f"{path} is empty; restore it or capture again.")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def index_tar(tar: mmap.mmap, path: Path) -> dict[str, Member]:
    """The members of a plain (ustar) tar by name. ValueError naming file and member where damaged or cut short."""
    members: dict[str, Member] = {}
    offset, last = 0, "the start"
    while tar[offset : offset + _BLOCK].strip(b"\0"):
        header = tar[offset : offset + _BLOCK]
        if len(header) < _BLOCK or not _checks(header):
            raise ValueError(f"{path} is damaged after {last}, at byte {offset}; restore it or capture again.")
        name = b"/".join(part.rstrip(b"\0") for part in (header[345:500], header[:100]) if part.strip(b"\0"))
        size = header[124:136].rstrip(b" \0")
        last = f"member {name.decode(errors='replace')}"
        if header[156:157] not in (b"0", b"\0") or not re.fullmatch(rb"[0-7]+", size):
            raise ValueError(f"{path}: {last} is no plain file of a plain size; restore the file or capture again.")
        member = Member(name.decode(errors="replace"), offset + _BLOCK, int(size, 8))
        if member.start + member.size > len(tar):
            raise ValueError(f"{path} is cut short in {last}; restore it or capture again.")
        if member.name in members:
            raise ValueError(f"{path} has {last} twice; restore it or capture again.")
        members[member.name] = member
        offset = member.start + -(-member.size // _BLOCK) * _BLOCK
    return members


def _checks(header: bytes) -> bool:
    try:
        expected = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    return sum(header[:148]) + sum(header[156:]) + 8 * ord(" ") == expected


def _last_member(tar: mmap.mmap, path: Path) -> str:
    try:
        members = index_tar(tar, path)
    except ValueError as error:
        return str(error).partition(";")[0].removeprefix(f"{path} ")
    return f"its last member is {list(members)[-1]}" if members else "it has no member"
