"""The streamed lists equal a sort of the whole matrix under the unique-prompt rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer

from fluxsae.records.features import read_features
from fluxsae.scoring.analyses.coherence import Coherence
from fluxsae.scoring.analyses.top_images import TopImages
from fluxsae.scoring.top_lists import TopList, TopLists
from tests.random_clip import random_clip
from tests.scoring.study import all_scores, make_study, run


def by_sorting(scores: list[float], prompts: list[int], n_images: int, unique: bool) -> list[int]:
    chosen: list[int] = []
    for image in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if scores[image] > 0 and not (unique and prompts[image] in {prompts[i] for i in chosen}):
            chosen.append(image)
    return chosen[:n_images]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 9), st.booleans())
def test_streamed_in_any_order_and_batches(seed: int, n_images: int, size: int, unique: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (20, 4), generator=generator).float()  # many ties and zeros
    prompts = torch.randint(0, 7, (20,), generator=generator)
    tops = [TopList(4, n_images, unique) for _ in range(2)]
    for n, part in enumerate(torch.randperm(20, generator=generator).split(size)):
        tops[n % 2].add(part, prompts[part], scores[part])
    tops[0].merge(tops[1].images, tops[1].prompts, tops[1].scores)
    expected = [by_sorting(scores[:, f].tolist(), prompts.tolist(), n_images, unique) for f in range(4)]
    assert tops[0].ids() == expected


@pytest.mark.parametrize("unique", [True, False])
@pytest.mark.parametrize(("n_kept", "n_features"), [(1, 4), (3, 33), (4, 40), (9, 70)])
def test_a_kernel_keeps_the_same(n_kept: int, n_features: int, unique: bool) -> None:
    """On a GPU where there is one, and in Triton's interpreter elsewhere."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(n_kept)
    scores = torch.randint(0, 6, (30, n_features), generator=generator).float()
    scores[:, 1] = 0.0
    prompts = torch.randint(0, 12, (30,), generator=generator) + 2**60
    by_kernel = TopList(n_features, n_kept, unique, device)
    by_kernel._by_kernel = True
    for part in torch.randperm(30, generator=generator).split(7):
        by_kernel.add(part.to(device), prompts[part].to(device), scores[part].to(device))
    expected = [by_sorting(scores[:, f].tolist(), prompts.tolist(), n_kept, unique) for f in range(n_features)]
    assert by_kernel.ids() == expected and not expected[1]
    merged = TopList(n_features, n_kept, unique, device)
    merged.merge(by_kernel.images, by_kernel.prompts, by_kernel.scores)
    assert merged.ids() == expected and bool((merged.scores[:, :-1] >= merged.scores[:, 1:]).all())


def test_callback(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    run(study, TopImages(study.features, n_images=4))
    scores, prompts = all_scores(study), [record.prompt_id for record in study.tokens.records]
    for row in read_features(study.features):
        assert list(row.top_images) == by_sorting(scores[:, row.feature].tolist(), prompts, 4, True)


def test_one_list_serves_all_who_ask_for_the_same(tmp_path: Path) -> None:
    study, clip = make_study(tmp_path), random_clip(tmp_path / "clip")
    one_process = Trainer(logger=False, accelerator="cpu", devices=1)
    scores, images = all_scores(study), torch.arange(24)
    prompts, tops = images // 2, TopLists()
    asked = [(2, True), (6, True), (4, True), (3, False)]
    for n_images, unique in asked:
        tops.ask(n_images, unique)
    for part in images.split(5):
        tops.add(part, prompts[part], scores[part])
    assert [top.scores.shape[1] for top in tops._lists.values()] == [6, 3]
    for n_images, unique in asked:
        expected = [by_sorting(scores[:, f].tolist(), prompts.tolist(), n_images, unique) for f in range(24)]
        assert tops.ids(one_process, n_images, unique) == expected

    def kept(*analyses: Callback) -> list[tuple[int, ...]]:
        run(study, *analyses)
        return [row.top_images for row in read_features(study.features)]

    alone = kept(TopImages(study.features, 4))
    deep = Coherence(study.features, study.images.folder, clip, n_images=6, n_null=2)
    assert kept(TopImages(study.features, 4), deep) == alone
    coherent = [row.coherence for row in read_features(study.features)]
    kept(deep)
    assert [row.coherence for row in read_features(study.features)] == coherent
