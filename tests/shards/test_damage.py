"""A set that is damaged says which file and which member."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from fluxsae.files.json_files import read_json, write_json
from fluxsae.shards import ShardSet, ShardWriter
from fluxsae.shards.verification import verify
from tests.faults.damage import Entry, read_tar, seal, write_tar
from tests.synthetic import image_shards, token_shards

TAR = "shard-00000.tar"


def test_a_folder_without_a_set(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ShardSet.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no metadata\.json"):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "format version 'list'"),
        ('{"version": 9}', "version 9"),
        ('{"version": 1}', "'kind'"),
    ],
)
def test_damaged_metadata(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        ShardSet.open(tmp_path)
    assert str(tmp_path / "metadata.json") in str(caught.value)


def test_the_wrong_kind_of_set(tmp_path: Path) -> None:
    shards = image_shards(tmp_path, 2, 1)
    with pytest.raises(ValueError, match="a set of images, expected tokens"):
        ShardSet.open(tmp_path, "tokens")
    for ask in (lambda: shards.spec, lambda: shards.statistics):
        with pytest.raises(ValueError, match="is a set of images"):
            ask()
    with pytest.raises(ValueError, match=r"image 2 is not in .* images 0 to 1"):
        shards.image(2)


def test_a_missing_shard(tmp_path: Path) -> None:
    token_shards(tmp_path)
    (tmp_path / TAR).unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00000\.tar is missing"):
        ShardSet.open(tmp_path)
    assert [str(problem) for problem in verify(tmp_path)] == [f"{TAR}: it is missing"]


@pytest.mark.parametrize(
    ("cut", "message"),
    [(-1500, "bytes, expected"), (2000, r"cut short in member 000000000\.tokens\.safetensors"), (0, "is empty")],
)
def test_a_tar_cut_short(tmp_path: Path, cut: int, message: str) -> None:
    token_shards(tmp_path, d_in=64)
    whole = (tmp_path / TAR).read_bytes()
    (tmp_path / TAR).write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=message) as caught:
        ShardSet.open(tmp_path).tokens(0)
    assert TAR in str(caught.value)
    assert len(verify(tmp_path)) == 1


def flip_header(data: bytearray) -> None:
    data[1024 + 130] ^= 0xFF  # inside the second member's tar header


def flip_safetensors(data: bytearray) -> None:
    data[1536 + 9] ^= 0xFF  # inside the JSON of the first safetensors file


def flip_record(data: bytearray) -> None:
    data[512] ^= 0xFF


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_header, r"damaged after member 000000000\.json"),
        (flip_safetensors, r"member 000000000\.tokens\.safetensors is damaged"),
        (flip_record, r"member 000000000\.json is damaged"),
    ],
)
def test_flipped_bits(tmp_path: Path, damage: Callable[[bytearray], None], message: str) -> None:
    token_shards(tmp_path)
    data = bytearray((tmp_path / TAR).read_bytes())
    damage(data)
    (tmp_path / TAR).write_bytes(data)
    shards = ShardSet.open(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        shards.record(0)
        shards.tokens(0)
    assert TAR in str(caught.value)
    assert any("checksum" in problem.what for problem in verify(tmp_path))


def test_a_flipped_bit_in_the_numbers_is_found_by_its_checksum(tmp_path: Path) -> None:
    token_shards(tmp_path)
    assert verify(tmp_path) == []
    data = bytearray((tmp_path / TAR).read_bytes())
    data[1536 + 200] ^= 1
    (tmp_path / TAR).write_bytes(data)
    assert [problem.what for problem in verify(tmp_path)] == ["its checksum is not the one in the metadata"]


def test_a_sound_set_of_pictures(tmp_path: Path) -> None:
    image_shards(tmp_path, 2, 1)
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.changed(124, b"-0000002000\0"), "no plain file of a plain size"),  # leads back, for ever
        (lambda entry: entry.changed(124, b"\x80" + bytes(11)), "no plain file of a plain size"),
        (lambda entry: entry.changed(124, b"77777777777\0"), "is cut short in member 000000000.tokens.safetensors"),
        (lambda entry: entry.changed(156, b"2/etc/passwd\0"), "no plain file"),
        (lambda entry: entry.named("000000001.json"), "has member 000000001.json twice"),
        (lambda entry: entry.named("../x"), r"member 000000000.tokens.safetensors is damaged: it is missing"),
        (lambda entry: entry.changed(0, b"\xff"), r"000000000.tokens.safetensors is damaged: it is missing"),
    ],
)
def test_members_that_are_none_of_ours(tmp_path: Path, change: Callable[[Entry], Entry], message: str) -> None:
    token_shards(tmp_path)
    entries = read_tar(tmp_path / TAR)
    write_tar(tmp_path / TAR, [entries[0], change(entries[1]), *entries[2:]], Random(0))
    with pytest.raises(ValueError, match=message) as caught:
        ShardSet.open(tmp_path).tokens(0)
    assert TAR in str(caught.value)
    assert verify(tmp_path)


def test_a_changed_digit_in_the_metadata(tmp_path: Path) -> None:
    token_shards(tmp_path)
    values = read_json(tmp_path / "metadata.json")
    values["statistics"]["mean"][0] += 1e-3
    write_json(tmp_path / "metadata.json", values)
    with pytest.raises(ValueError, match=r"metadata\.json .*does not have the hash"):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize("name", ["../shard-00000.tar", "/etc/passwd", "shard-00001.tar"])
def test_metadata_names_no_file_but_its_shards(tmp_path: Path, name: str) -> None:
    token_shards(tmp_path)
    values = read_json(tmp_path / "metadata.json")
    values["shards"][0]["name"] = name
    write_json(tmp_path / "metadata.json", seal(values))
    with pytest.raises(ValueError, match=r"metadata\.json .*expected 'shard-00000\.tar'"):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize("damage", ["{", "{}", "[]", '{"hash": 1}'])
def test_a_shard_whose_record_is_damaged_is_made_again(tmp_path: Path, damage: str) -> None:
    spec = token_shards(tmp_path).spec
    writer = ShardWriter(tmp_path, spec, images_per_shard=5)
    assert writer.is_complete(0)
    (tmp_path / "shard-00000.json").write_text(damage)
    assert not writer.is_complete(0) and writer.is_complete(1)


def test_a_changed_share_of_the_statistics_is_not_taken(tmp_path: Path) -> None:
    spec = token_shards(tmp_path).spec
    values = read_json(tmp_path / "shard-00000.json")
    values["sums"]["norms"] += 1.0
    write_json(tmp_path / "shard-00000.json", values)
    assert not ShardWriter(tmp_path, spec, images_per_shard=5).is_complete(0)
