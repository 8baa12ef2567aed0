"""What can happen to the files of a shard set, as functions that do it: rot, short copies, forgeries, losses."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from fluxsae.files.json_files import hash_json

BLOCK = 512


class Damage(NamedTuple):
    """What was done: the files an error may name, and whether a record was forged together with its hash."""

    what: str
    files: tuple[str, ...]
    forged: bool = False


Fault = Callable[[Random, Path], Damage]


class Entry(NamedTuple):
    """A member of a tar: its header of 512 bytes, and its content."""

    header: bytes
    data: bytes

    @property
    def name(self) -> str:
        return self.header[:100].rstrip(b"\0").decode()

    def changed(self, start: int, field: bytes) -> Entry:
        """With `field` at `start` of its header, and the header's checksum made right."""
        header = bytearray(self.header)
        header[start : start + len(field)] = field
        return Entry(sealed_header(header), self.data)

    def named(self, name: str) -> Entry:
        return self.changed(0, name.encode().ljust(100, b"\0"))

    def holding(self, data: bytes) -> Entry:
        return Entry(self.changed(124, b"%011o\0" % len(data)).header, data)


def sealed_header(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def read_tar(path: Path) -> list[Entry]:
    data, entries, offset = path.read_bytes(), [], 0
    while data[offset : offset + BLOCK].strip(b"\0"):
        size = int(data[offset + 124 : offset + 135], 8)
        entries.append(Entry(data[offset : offset + BLOCK], data[offset + BLOCK : offset + BLOCK + size]))
        offset += BLOCK + -(-size // BLOCK) * BLOCK
    return entries


def write_tar(path: Path, entries: list[Entry], rng: Random) -> None:
    """Half of the time the metadata then tells the new size, so that a reader gets past the first of its checks."""
    data = b"".join(e.header + e.data + bytes(-len(e.data) % BLOCK) for e in entries) + bytes(2 * BLOCK)
    data += bytes(-len(data) % (20 * BLOCK))
    path.write_bytes(data)
    metadata = json.loads((path.parent / "metadata.json").read_text())
    if rng.random() < 0.5:
        next(shard for shard in metadata["shards"] if shard["name"] == path.name)["bytes"] = len(data)
        write_record(path.parent / "metadata.json", seal(metadata))


def seal(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    inner = {key: value for key, value in values.items() if key != "hash"}
    return {**inner, "hash": hash_json(inner)}


def write_record(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def any_file(rng: Random, folder: Path) -> Path:
    """A tar as often as a JSON file."""
    suffix = rng.choice([".tar", ".json"])
    return rng.choice(sorted(path for path in folder.iterdir() if path.suffix == suffix))


def any_tar(rng: Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.glob("shard-*.tar")))


# Any file


def flip_bits(rng: Random, folder: Path) -> Damage:
    path = any_file(rng, folder)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return Damage(f"flipped bits of {path.name}", (path.name,))


def overwrite(rng: Random, folder: Path) -> Damage:
    path = any_file(rng, folder)
    data = bytearray(path.read_bytes())
    start, length = rng.randrange(len(data)), rng.choice([1, 8, 512, 4096])
    length = min(length, len(data) - start)
    data[start : start + length] = bytes(length) if rng.random() < 0.5 else rng.randbytes(length)
    path.write_bytes(data)
    return Damage(f"overwrote {length} bytes of {path.name}", (path.name,))


def truncate(rng: Random, folder: Path) -> Damage:
    path = any_file(rng, folder)
    size = rng.choice([0, 1, rng.randrange(path.stat().st_size), path.stat().st_size - 1])
    os.truncate(path, size)
    return Damage(f"cut {path.name} to {size} bytes", (path.name,))


def extend(rng: Random, folder: Path) -> Damage:
    path = any_file(rng, folder)
    more = rng.choice([bytes(BLOCK), rng.randbytes(BLOCK), b"\0", b"}", path.read_bytes()])
    with path.open("ab") as file:
        file.write(more)
    return Damage(f"added {len(more)} bytes to {path.name}", (path.name,))


def lose(rng: Random, folder: Path) -> Damage:
    """Delete a file, or put a folder, a dangling link, a link to itself or another file in its place."""
    path = any_file(rng, folder)
    how = rng.choice(["nothing", "a folder", "a dangling link", "a link to itself", "another file"])
    data = rng.choice(sorted(p for p in folder.iterdir() if p.suffix == path.suffix)).read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how == "a dangling link":
        path.symlink_to(folder / "nowhere")
    elif how == "a link to itself":
        path.symlink_to(path)
    elif how == "another file":
        path.write_bytes(data)
    return Damage(f"put {how} in place of {path.name}", (path.name, "metadata.json"))


def swap_files(rng: Random, folder: Path) -> Damage:
    suffix = rng.choice([".tar", ".json"])
    a, b = rng.sample(sorted(path for path in folder.iterdir() if path.suffix == suffix), 2)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    return Damage(f"swapped {a.name} and {b.name}", (a.name, b.name))


# Tar members


def flip_header(rng: Random, folder: Path) -> Damage:
    """A flipped bit of a member's header, half of the time with a checksum that agrees."""
    path = any_tar(rng, folder)
    entries = read_tar(path)
    index, bit = rng.randrange(len(entries)), rng.randrange(8 * 345)
    header = bytearray(entries[index].header)
    header[bit // 8] ^= 1 << bit % 8
    sealed = rng.random() < 0.5
    entries[index] = Entry(sealed_header(header) if sealed else bytes(header), entries[index].data)
    write_tar(path, entries, rng)
    return Damage(f"flipped header bit {bit} of member {index} of {path.name}, sealed {sealed}", (path.name,))


def mix_members(rng: Random, folder: Path) -> Damage:
    path = any_tar(rng, folder)
    entries = read_tar(path)
    how = rng.choice(["swap names", "swap contents", "duplicate", "delete", "reorder", "rename", "add"])
    a, b = rng.sample(range(len(entries)), 2)
    if how == "swap names":
        entries[a], entries[b] = entries[a].named(entries[b].name), entries[b].named(entries[a].name)
    elif how == "swap contents":
        entries[a], entries[b] = entries[a].holding(entries[b].data), entries[b].holding(entries[a].data)
    elif how == "duplicate":
        entries.insert(b, entries[a] if rng.random() < 0.5 else entries[b].named(entries[a].name))
    elif how == "delete":
        del entries[a]
    elif how == "reorder":
        rng.shuffle(entries)
    elif how == "rename":
        entries[a] = entries[a].named(rng.choice(["", "x", entries[a].name.upper(), "9" * 100, "\u202e", "a\nb"]))
    else:
        entries.insert(a, entries[b].named("000000999.json"))
    write_tar(path, entries, rng)
    return Damage(f"members {a} and {b} of {path.name}: {how}", (path.name,))


def trick_members(rng: Random, folder: Path) -> Damage:
    """What archives do to careless readers: paths that lead elsewhere, links, devices, sizes that are lies."""
    path = any_tar(rng, folder)
    entries = read_tar(path)
    index = rng.randrange(len(entries))
    entry = entries[index]
    tricks: dict[str, Entry] = {
        "a path that leads up": entry.named(f"../../{entry.name}"),
        "an absolute path": entry.named("/etc/passwd"),
        "a prefix that leads up": entry.changed(345, b"../..\0"),
        "a symbolic link": entry.changed(156, b"2/etc/passwd\0"),
        "a hard link": entry.changed(156, b"1" + entries[index - 1].name.encode() + b"\0"),
        "a device": entry.changed(156, rng.choice([b"3", b"4", b"6"])),
        "a folder": entry.changed(156, b"5"),
        "an extended header": entry.changed(156, rng.choice([b"x", b"g", b"L", b"K", b"S"])),
        "10 GB": entry.changed(124, b"%011o\0" % (10 * 10**9 % 8**11)),
        "8 GB": entry.changed(124, b"77777777777\0"),
        "10 GB in base 256": entry.changed(124, b"\x80" + (10 * 10**9).to_bytes(11, "big")),
        "a negative size in base 256": entry.changed(124, b"\xff" * 12),
        "a negative size": entry.changed(
            124, rng.choice([b"-1\0", b"-0000001000\0", b"-0000002000\0"]).ljust(12, b"\0")
        ),
        "a size with underscores": entry.changed(124, b"1_0\0".ljust(12, b"\0")),
        "no size": entry.changed(124, rng.choice([bytes(12), b" " * 12])),
        "size 0": entry.changed(124, b"00000000000\0"),
        "a name that is not UTF-8": entry.changed(0, b"\xff\xfe"),
    }
    trick = rng.choice(sorted(tricks))
    entries[index] = tricks[trick]
    write_tar(path, entries, rng)
    return Damage(f"member {index} of {path.name} is {trick}", (path.name,))


def change_member(rng: Random, folder: Path) -> Damage:
    """A member's content in its own format: a safetensors header, a record, the chunks of a picture."""
    path = any_tar(rng, folder)
    entries = read_tar(path)
    index = rng.randrange(len(entries))
    entry = entries[index]
    change = {"json": _change_json, "safetensors": _change_safetensors, "png": _change_png}[entry.name.split(".")[-1]]
    entries[index] = entry.holding(change(rng, entry.data))
    write_tar(path, entries, rng)
    return Damage(f"changed the content of {entry.name} in {path.name}", (path.name,))


def _change_json(rng: Random, data: bytes) -> bytes:
    return spoiled_json(rng, json.loads(data)).encode("utf-8", "surrogatepass")


def _change_safetensors(rng: Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    how = rng.randrange(6)
    entry = header[rng.choice([key for key in header if key != "__metadata__"])]
    if how == 0:
        return rng.choice([0, length - 1, length + 1, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little") + data[8:]
    if how == 1:
        entry["dtype"] = rng.choice(["BF16", "F32", "F8_E4M3", "F64", "", None, [], 7])
    elif how == 2:
        shape = entry["shape"]
        others: list[Any] = [[-n for n in shape], [float(n) for n in shape], shape[::-1], [10**10, 10**10], [], None]
        entry["shape"] = rng.choice([*others, [*shape, 1], [1, *shape], [0], [shape], "44", {"a": 1}])
    elif how == 3:
        begin, end = entry["data_offsets"]
        pairs: list[Any] = [[end, begin], [begin - 1, end - 1], [begin + 1, end + 1], [10**30, 10**31], [begin], None]
        entry["data_offsets"] = rng.choice([*pairs, [0, -1], [float(begin), float(end)], [str(begin), end]])
    elif how == 4:
        header["other" if rng.random() < 0.5 else "scale"] = header.pop("tokens")
    text = spoiled_json(rng, header) if how == 5 else json.dumps(header)
    new = text.encode("utf-8", "surrogatepass")
    new += b" " * max(0, length - len(new))
    return len(new).to_bytes(8, "little") + new + body


def _change_png(rng: Random, data: bytes) -> bytes:
    """Chunks with checksums that agree, so that a reader has to look at what they say."""
    chunks, offset = [], 8
    while offset < len(data):
        size = int.from_bytes(data[offset : offset + 4], "big")
        chunks.append((data[offset + 4 : offset + 8], data[offset + 8 : offset + 8 + size]))
        offset += 12 + size
    how = rng.randrange(6)
    if how == 0:
        size = rng.choice([0, 1, 48, 11_000, 30_000, 2**31 - 1])
        chunks[0] = (b"IHDR", struct.pack(">II", size, size) + chunks[0][1][8:])
    elif how == 1:
        chunks[0] = (b"IHDR", chunks[0][1][:8] + rng.randbytes(5))
    elif how == 2:
        text = b"a\0" + b"\0" + zlib.compress(bytes(200 * 2**20))
        chunks.insert(1, (b"zTXt", text))
    elif how == 3:
        del chunks[rng.randrange(len(chunks))]
    elif how == 4:
        index = rng.randrange(len(chunks))
        chunks[index] = (chunks[index][0], rng.randbytes(len(chunks[index][1])))
    else:
        return rng.choice([b"GIF89a" + data[6:], b"P6 9999999 9999999 255\n" + data, b"%!PS\n" + data, b"BM" + data])
    body = b"".join(len(c).to_bytes(4, "big") + k + c + zlib.crc32(k + c).to_bytes(4, "big") for k, c in chunks)
    return data[:8] + body


# JSON files


def change_record(rng: Random, folder: Path) -> Damage:
    """Values, keys and structure of a JSON file; one time in three its hash is forged to agree, or left out."""
    path = rng.choice([folder / "metadata.json", *sorted(folder.glob("*.json"))])
    values = json.loads(path.read_text())
    forged = rng.random() < 1 / 3
    if path.name == "metadata.json" and rng.random() < 0.3:
        names = ["../shard-00000.tar", "/etc/passwd", "/dev/zero", "", ".", "shard-00001.tar", 7, None, "\0"]
        rng.choice(values["shards"])["name"] = rng.choice(names)
        text = json.dumps(values)
    else:
        text = spoiled_json(rng, values)
    if forged:
        try:
            values = json.loads(text)
            text = json.dumps(seal(values) if rng.random() < 0.5 else {k: v for k, v in values.items() if k != "hash"})
        except (ValueError, RecursionError, AttributeError):
            pass
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return Damage(f"changed what {path.name} says", (path.name,), forged)


def spoiled_json(rng: Random, values: Any) -> str:
    """`values` with something wrong somewhere, as text."""
    whole = rng.random()
    if whole < 0.1:
        return rng.choice(
            ["", "null", "[]", "7", '"text"', "{}", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\ud800"]
        )
    holder, key = rng.choice(_places(values))
    how = rng.randrange(4)
    if how == 0 and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    elif how == 1:
        del holder[key]
    elif how == 2 and type(holder[key]) in (int, float):
        holder[key] = rng.choice(
            [holder[key] + 1, -holder[key], holder[key] * 2, float(holder[key]), holder[key] + 1e-6]
        )
    else:
        odd: list[Any] = [None, True, "", "7", "\ud800", [], {}, [[1]], -1, 0, 2**70, 10**400, 1e308, float("nan")]
        holder[key] = rng.choice([*odd, float("inf"), {"a": 1}, "x" * 100_000])
    return json.dumps(values)


def _places(values: Any) -> list[tuple[Any, Any]]:
    """Every place in `values`; of a long list only some."""
    keys = list(values) if isinstance(values, dict) else list(range(min(3, len(values))))
    inner = [place for key in keys if isinstance(values[key], dict | list) for place in _places(values[key])]
    return [(values, key) for key in keys] + inner


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        *(flip_bits, overwrite, truncate, extend, lose, swap_files),
        *(flip_header, mix_members, trick_members, change_member, change_record),
    )
}
