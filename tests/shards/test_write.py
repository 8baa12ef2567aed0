"""Shards appear when whole, are known when complete, and refuse what does not belong."""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from webdataset import TarWriter

from fluxsae.shards import ShardSet, ShardWriter
from fluxsae.shards.format import Storage
from fluxsae.shards.verification import verify
from tests.synthetic import capture_spec, generation_spec, records, token_shards


def write_shard(writer: ShardWriter, shard: int, n: int = 4) -> None:
    for record in records(8)[shard * 4 : shard * 4 + n]:
        writer.add(shard, record, torch.ones(16, 8))
    writer.close_shard(shard)


def test_a_shard_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, capture_spec(), images_per_shard=4)
    writer.add(0, records(2)[0], torch.ones(16, 8))
    assert not (tmp_path / "shard-00000.tar").exists() and not writer.is_complete(0)
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
    write_shard(writer, 0)
    assert writer.is_complete(0) and writer.is_complete(0, samples=4) and not writer.is_complete(0, samples=5)


def test_a_shard_goes_on_behind_what_was_kept(tmp_path: Path) -> None:
    write_shard(ShardWriter(tmp_path / "whole", capture_spec(), images_per_shard=4), 0)
    writer = ShardWriter(tmp_path / "broken", capture_spec(), images_per_shard=4)
    for record in records(8)[:3]:
        writer.add(0, record, torch.ones(16, 8))
        if record.image == 1:
            writer.keep(0)
    writer.abandon()
    writer = ShardWriter(tmp_path / "broken", capture_spec(), images_per_shard=4)
    assert writer.kept(0) == 2 and writer.kept(1) == 0 and not writer.is_complete(0)
    for record in records(8)[2:4]:
        writer.add(0, record, torch.ones(16, 8))
    writer.close_shard(0)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "broken" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "broken").iterdir())) == 2


@pytest.mark.parametrize("storage", ["bf16", "fp32", "fp8"])
def test_tokens_that_are_not_finite_may_be_skipped(
    tmp_path: Path, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = [torch.full((16, 8), image + 1.0) for image in range(8)]
    tokens[1][2, 3], tokens[2][0, 0], tokens[6][15, 7] = math.nan, math.inf, -math.inf
    for folder, broken_off in (("whole", False), ("broken", True)):
        writer = ShardWriter(tmp_path / folder, capture_spec(), "tokens", storage, 4, skip_not_finite=True)
        for record in records(4):
            writer.add(record.image // 4, record, tokens[record.image])
            if broken_off and record.image == 1:
                writer.keep(0)
                writer.abandon()
                writer = ShardWriter(tmp_path / folder, capture_spec(), "tokens", storage, 4, skip_not_finite=True)
                assert writer.kept(0) == 2
            if record.image in (3, 7):
                writer.close_shard(record.image // 4)
        writer.finalise(2)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "broken" / path.name).read_bytes() == path.read_bytes()
    shards = ShardSet.open(tmp_path / "whole")
    assert shards.skipped == {1, 2, 6} and [list(entry.skipped) for entry in shards.metadata.shards] == [[1, 2], [6]]
    assert [float(shards.tokens(image).mean()) for image in range(8)] == [1, 0, 0, 4, 5, 6, 0, 8]
    assert shards.statistics.n_tokens == 5 * 16 and torch.allclose(shards.statistics.mean, torch.tensor(4.8).double())
    assert "tokens of image 6" in caplog.text and not verify(tmp_path / "whole")


def test_a_list_of_skipped_images_that_are_not_the_shards_is_refused(tmp_path: Path) -> None:
    token_shards(tmp_path, 2, 1, skipped=[1])
    values = json.loads((tmp_path / "metadata.json").read_text())
    del values["hash"]
    for wrong in ([2], ["1"], [True], 1):
        values["shards"][0]["skipped"] = wrong
        (tmp_path / "metadata.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match="not a shard set's metadata"):
            ShardSet.open(tmp_path)


@pytest.mark.parametrize("change", [{"storage": "fp32"}, {"images_per_shard": 8}, {"spec": capture_spec(guidance=1.0)}])
def test_what_was_kept_for_something_else_is_begun_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    options: dict[str, Any] = {"spec": capture_spec(), "images_per_shard": 4}
    writer = ShardWriter(tmp_path, **options)
    writer.add(0, records(2)[0], torch.ones(16, 8))
    writer.keep(0)
    writer.abandon()
    assert ShardWriter(tmp_path, **options | change).kept(0) == 0
    writer = ShardWriter(tmp_path, **options)
    assert writer.kept(0) == 1
    (part,) = tmp_path.glob(".*.tar")
    part.write_bytes(part.read_bytes()[:-1])
    assert ShardWriter(tmp_path, **options).kept(0) == 0


def test_a_shard_is_a_plain_webdataset_tar(tmp_path: Path) -> None:
    """Byte for byte what webdataset's own writer makes of the same samples."""
    write_shard(ShardWriter(tmp_path, capture_spec(), images_per_shard=4), 0)
    path, again = tmp_path / "shard-00000.tar", tmp_path / "again.tar"
    with tarfile.open(path) as tar:
        contents = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    with again.open("wb") as file:
        writer = TarWriter(file, user="fluxsae", group="fluxsae", mode=0o644, mtime=0, encoder=False)
        for key in sorted({name.partition(".")[0] for name in contents}):
            of_key = {name.partition(".")[2]: data for name, data in contents.items() if name.startswith(key)}
            writer.write({"__key__": key, **of_key})
        writer.close()
    assert again.read_bytes() == path.read_bytes()


def test_what_a_killed_process_left_is_swept_up(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, capture_spec(), images_per_shard=4)
    (tmp_path / ".shard-00000-abc.tar").write_bytes(b"half")
    write_shard(writer, 0)
    writer.finalise(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metadata.json", "shard-00000.json", "shard-00000.tar"]


def test_a_shard_cut_short_or_of_another_spec_is_not_complete(tmp_path: Path) -> None:
    write_shard(ShardWriter(tmp_path, capture_spec(), images_per_shard=4), 0)
    for other in (
        ShardWriter(tmp_path, capture_spec(guidance=1.0), images_per_shard=4),
        ShardWriter(tmp_path, capture_spec(), storage="fp8", images_per_shard=4),
        ShardWriter(tmp_path, capture_spec(), images_per_shard=8),
    ):
        assert not other.is_complete(0)
    assert ShardWriter(tmp_path, capture_spec(model="elsewhere/tiny"), images_per_shard=4).is_complete(0)
    tar = tmp_path / "shard-00000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    assert not ShardWriter(tmp_path, capture_spec(), images_per_shard=4).is_complete(0)


def test_a_missing_shard_stops_finalise(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, capture_spec(), images_per_shard=4)
    write_shard(writer, 0)
    with pytest.raises(ValueError, match=r"shard-00001\.tar is not whole"):
        writer.finalise(2)


def test_a_gap_between_shards_stops_finalise(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, capture_spec(), images_per_shard=4)
    write_shard(writer, 0, n=3)
    write_shard(writer, 1)
    with pytest.raises(ValueError, match="starts at image 4, expected 3"):
        writer.finalise(2)


def test_another_capture_in_the_same_folder_is_refused_with_both_values(tmp_path: Path) -> None:
    token_shards(tmp_path)
    with pytest.raises(ValueError, match=r"guidance: 3\.5 != 1\.0"):
        ShardWriter(tmp_path, capture_spec(guidance=1.0))
    with pytest.raises(ValueError, match="storage: 'bf16' != 'fp8'"):
        ShardWriter(tmp_path, capture_spec(), storage="fp8")
    with pytest.raises(ValueError, match="holds a set of tokens"):
        ShardWriter(tmp_path, generation_spec(), kind="images")


def test_tokens_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, capture_spec())
    with pytest.raises(ValueError, match=r"image 3 .* NaN or infinite"):
        writer.add(0, records(3)[3], torch.full((16, 8), float("nan")))


def test_images_out_of_order_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, capture_spec())
    writer.add(0, records(3)[3], torch.ones(16, 8))
    with pytest.raises(ValueError, match="image 5 does not follow image 3"):
        writer.add(0, records(3)[5], torch.ones(16, 8))
    writer.abandon()
    with pytest.raises(ValueError, match="no samples to close"):
        writer.close_shard(0)
