"""What goes into a shard set comes out, for us and for readers that know only tar and safetensors."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxsae.shards import ShardSet, ShardWriter, read
from fluxsae.shards.encoding import decode_fp8, decode_tokens, encode_tokens
from fluxsae.shards.format import METADATA, Storage
from tests.synthetic import capture_spec, dictionary, draw, generation_spec, image_shards, records, token_shards

TOLERANCE = {"fp32": 0.0, "bf16": 2**-8, "fp8": 2**-4}


@pytest.mark.parametrize("storage", ["fp32", "bf16", "fp8"])
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(-30, 30), st.integers(0, 10))
def test_tokens_survive_encoding(storage: Storage, n_tokens: int, d_in: int, exponent: int, seed: int) -> None:
    tokens = torch.randn(n_tokens, d_in, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    data = bytearray(encode_tokens(tokens, storage))
    decoded = decode_tokens(data, 0, len(data)).float()
    # fp8 keeps 3 bits of mantissa; what is below 2^-14 of a token's largest entry is lost to its smallest step.
    floor = tokens.abs().amax(dim=1, keepdim=True) * (2.0**-14 if storage == "fp8" else 0.0)
    assert bool(((decoded - tokens).abs() <= TOLERANCE[storage] * tokens.abs() + floor).all())


def test_fp8_of_a_zero_token_is_zero() -> None:
    data = bytearray(encode_tokens(torch.zeros(2, 3), "fp8"))
    assert torch.equal(decode_tokens(data, 0, len(data)).float(), torch.zeros(2, 3))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.lists(st.sampled_from([2.0**-90, 2.0**-9, 0.5, 1.0, 4.0, 2.0**40, 0.3]), min_size=1),
)
def test_decoding_fp8_is_the_product_for_every_code(n_tokens: int, d_in: int, scales: list[float]) -> None:
    generator = torch.Generator().manual_seed(n_tokens)
    codes = torch.randint(0, 256, (n_tokens, d_in), dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
    scale = torch.tensor([scales[i % len(scales)] for i in range(n_tokens)])
    expected = (codes.float() * scale[:, None]).to(torch.bfloat16)
    assert torch.equal(decode_fp8(codes, scale).nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(decode_fp8(codes, scale).isnan(), expected.isnan())


def test_every_pair_of_fp8_codes_is_decoded() -> None:
    codes = torch.arange(2**16).to(torch.int32).view(torch.uint8).view(-1, 4)[:, :2].contiguous()
    tokens = codes.view(torch.float8_e4m3fn)
    decoded, expected = decode_fp8(tokens, torch.full((2**16,), 0.25)), (tokens.float() / 4).to(torch.bfloat16)
    assert torch.equal(decoded.view(torch.int16)[~expected.isnan()], expected.view(torch.int16)[~expected.isnan()])
    assert torch.equal(decoded.isnan(), expected.isnan()) and int(expected.isnan().sum()) == 4 * 256 - 4 + 4


@pytest.mark.parametrize("storage", ["fp32", "bf16", "fp8"])
def test_a_set_reads_back_in_any_order(tmp_path: Path, storage: Storage) -> None:
    shards = token_shards(tmp_path, 7, 2, storage=storage, images_per_shard=4)
    source, generator = dictionary(16), torch.Generator().manual_seed(0)
    tokens = [draw(source, 16, generator) for _ in range(14)]
    assert len(shards) == 14 and shards.spec == capture_spec() and shards.records == records(7)
    for image in random.Random(0).sample(range(14), 14):
        assert torch.allclose(shards.tokens(image).float(), tokens[image], rtol=TOLERANCE[storage], atol=2e-3)
    assert shards.tokens_batch([13, 0]).shape == (2, 16, 16)
    assert torch.equal(shards.tokens_batch([13, 0])[1], shards.tokens(0))


def test_pictures_read_back(tmp_path: Path) -> None:
    shards = image_shards(tmp_path, 3, 2)
    assert shards.generation == generation_spec()
    assert np.asarray(shards.image(4)).shape == (64, 64, 3)
    assert np.asarray(shards.image(2))[0, 0].tolist() == [37, 101, 59]


def test_statistics_are_those_of_the_stored_tokens(tmp_path: Path) -> None:
    shards = token_shards(tmp_path, 5, 2, images_per_shard=3)
    x = shards.tokens_batch(range(10)).flatten(0, 1).double()
    numbers = shards.statistics
    assert numbers.n_tokens == len(x)
    assert torch.allclose(numbers.mean, x.mean(dim=0), atol=1e-12)
    assert numbers.mean_norm == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-12)
    normalised = (x - numbers.mean) * numbers.scale
    assert float(normalised.var(dim=0, correction=0).mean()) == pytest.approx(1.0, rel=1e-12)


def test_writing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        token_shards(tmp_path / name, 4, 2)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(4)), n_writers=st.integers(1, 3))
def test_the_set_does_not_depend_on_who_wrote_what_when(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], n_writers: int
) -> None:
    folder = tmp_path_factory.mktemp("set")
    generator = torch.Generator().manual_seed(0)
    tokens = [draw(dictionary(16), 16, generator) for _ in range(14)]
    writers = [ShardWriter(folder / "b", capture_spec(), images_per_shard=4) for _ in range(n_writers)]
    for shard in order:
        writer = writers[shard % n_writers]
        for record in records(7)[shard * 4 : shard * 4 + 4]:
            writer.add(shard, record, tokens[record.image])
        writer.close_shard(shard)
    writers[0].finalise(4)
    token_shards(folder / "a", 7, 2, images_per_shard=4)
    assert (folder / "a" / METADATA).read_bytes() == (folder / "b" / METADATA).read_bytes()


def test_a_plain_tar_reader_understands_it(tmp_path: Path) -> None:
    shards = token_shards(tmp_path, 2, 2, storage="fp8", images_per_shard=4)
    with tarfile.open(tmp_path / "shard-00000.tar") as tar:
        assert tar.getnames()[:2] == ["000000000.json", "000000000.tokens.safetensors"]
        tensors = safetensors.torch.load(tar.extractfile("000000001.tokens.safetensors").read())  # type: ignore[union-attr]
        record = json.load(tar.extractfile("000000001.json"))  # type: ignore[arg-type]
    assert record == records(2)[1]._asdict()
    decoded = tensors["tokens"].float() * tensors["scale"][:, None]
    assert torch.equal(decoded, shards.tokens(1).float())


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the tar's file to the garbage collector
def test_webdataset_understands_it(tmp_path: Path) -> None:
    shards = token_shards(tmp_path, 2, 2, images_per_shard=4)
    url = str(tmp_path / "shard-00000.tar")
    samples = list(webdataset.WebDataset(url, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(4)]
    tokens = safetensors.torch.load(samples[3]["tokens.safetensors"])["tokens"]
    assert torch.equal(tokens, shards.tokens(3))


def test_a_set_travels_to_worker_processes(tmp_path: Path) -> None:
    import pickle

    shards = token_shards(tmp_path, 2, 2)
    before = shards.tokens(1).clone()
    assert torch.equal(pickle.loads(pickle.dumps(shards)).tokens(1), before)


def test_reading_never_writes(tmp_path: Path) -> None:
    shards = token_shards(tmp_path, 2, 2)
    before = (tmp_path / "shard-00000.tar").read_bytes()
    shards.tokens(0).zero_()
    assert (tmp_path / "shard-00000.tar").read_bytes() == before
    assert io.BytesIO(before).getbuffer().nbytes == ShardSet.open(tmp_path).metadata.shards[0].bytes


def test_shards_beyond_those_kept_open_are_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_MAPS", 3)
    opened: list[str] = []
    open_tar = read.open_tar
    monkeypatch.setattr(read, "open_tar", lambda path, n_bytes: opened.append(path.stem) or open_tar(path, n_bytes))
    shards = token_shards(tmp_path, 10, 2, images_per_shard=4)
    expected = [shards.tokens(image).clone() for image in range(20)]
    assert len(opened) == 5
    for _ in range(2):
        assert all(torch.equal(shards.tokens(image), expected[image]) for image in range(20))
    assert opened[5:] == ["shard-00002", "shard-00003", "shard-00004"] * 2


def test_of_few_shards_is_it_known_where_members_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were looked into last, so that memory does not grow with a set."""
    monkeypatch.setattr(read, "_INDICES", 2)
    looked_into: list[str] = []
    index_tar = read.index_tar
    monkeypatch.setattr(read, "index_tar", lambda tar, path: looked_into.append(path.stem[-1]) or index_tar(tar, path))
    shards = token_shards(tmp_path, 6, 2, images_per_shard=4)
    for image in (0, 4, 0, 8, 1, 5, 11, 3):
        assert shards.record(image).image == image
    assert "".join(looked_into) == "0121" + "2" + "0" and len(shards._indices) == 2
