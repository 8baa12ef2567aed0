"""Which channels stand out, and what fp8 would lose of them and the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fluxsae.shards import ShardSet, ShardWriter
from fluxsae.shards.channels import describe_channels
from fluxsae.shards.format import Storage
from tests.synthetic import capture_spec, records

N_IMAGES, D_IN = 6, 64


def write(folder: Path, factors: dict[int, float], means: dict[int, float], storage: Storage = "fp32") -> ShardSet:
    writer = ShardWriter(folder, capture_spec(), storage=storage, images_per_shard=N_IMAGES)
    generator = torch.Generator().manual_seed(0)
    for record in records(N_IMAGES, 1):
        tokens = torch.randn(16, D_IN, generator=generator)
        for channel, factor in factors.items():
            tokens[:, channel] *= factor
        for channel, mean in means.items():
            tokens[:, channel] += mean
        writer.add(0, record, tokens)
    writer.close_shard(0)
    writer.finalise(1)
    return ShardSet.open(folder)


def test_channels_that_stand_out_are_named_with_their_share(tmp_path: Path) -> None:
    shards = write(tmp_path, {3: 100.0, 9: 20.0}, {9: -50.0, 30: 9.0})
    found = describe_channels(shards)
    assert [outlier.channel for outlier in found.outliers] == [3, 9, 30]
    tokens = torch.cat([shards.tokens(i) for i in range(N_IMAGES)]).double()
    variance = tokens.var(dim=0, correction=0)
    unit = float(variance.median().sqrt())
    for outlier in found.outliers:
        assert outlier.share == pytest.approx(float(variance[outlier.channel] / variance.sum()))
        assert outlier.mean == pytest.approx(float(tokens[:, outlier.channel].mean()) / unit)
        assert outlier.deviation == pytest.approx(float(variance[outlier.channel].sqrt()) / unit)
    assert str(found).startswith("3 of 64 channels stand out, with 99.")


def test_what_fp8_would_lose_is_what_it_loses(tmp_path: Path) -> None:
    exact = write(tmp_path / "fp32", {3: 100.0}, {})
    rounded = write(tmp_path / "fp8", {3: 100.0}, {}, "fp8")
    tokens, stored = (torch.cat([s.tokens(i).double() for i in range(N_IMAGES)]) for s in (exact, rounded))
    expected = float((tokens - stored).square().sum() / (tokens - tokens.mean(dim=0)).square().sum())
    assert describe_channels(exact).fp8_loss == pytest.approx(expected, rel=1e-6) and 0 < expected < 1e-2
    found = describe_channels(rounded)
    assert found.fp8_loss is None and "fp8" not in str(found)


def test_nothing_stands_out_of_noise_or_of_a_constant(tmp_path: Path) -> None:
    assert str(describe_channels(write(tmp_path / "noise", {}, {}))).startswith(
        "no channel stands out among 64; as fp8"
    )
    constant = write(tmp_path / "constant", dict.fromkeys(range(D_IN), 0.0), {})
    assert describe_channels(constant) == (D_IN, [], 0.0)


def test_a_few_images_are_enough(tmp_path: Path) -> None:
    shards = write(tmp_path, {3: 100.0}, {})
    assert [outlier.channel for outlier in describe_channels(shards, n_tokens=20).outliers] == [3]
