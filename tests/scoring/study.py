"""A small scored study made of synthetic shards: 12 prompts × 2 repetitions of 64×64 pixels, an SAE of 24 features."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, Trainer

from fluxsae.data.activations import ActivationData
from fluxsae.records.features import Selection
from fluxsae.sae import SAE, TopK, save_sae
from fluxsae.scoring.module import SAEScoring
from fluxsae.scoring.reading import CodeReading
from fluxsae.shards.read import ShardSet
from tests.synthetic import image_shards, token_shards

N_FEATURES = 24


class Study(NamedTuple):
    folder: Path
    tokens: ShardSet
    images: ShardSet
    sae: SAE

    @property
    def features(self) -> Path:
        return self.folder / "features.csv"


def make_study(folder: Path, skipped: Collection[int] = ()) -> Study:
    torch.manual_seed(0)
    tokens, images = token_shards(folder / "tokens", skipped=skipped), image_shards(folder / "images")
    sae = TopK(16, N_FEATURES, 2)
    sae.set_statistics(tokens.statistics, tokens.spec)
    save_sae(folder / "sae", sae)
    lines = [
        {
            "id": p,
            "prompt": f"a small thing number {p}",
            "attributes": {"object": f"thing {p}", "kind": "a|b" if p % 2 else "b"},
        }
        for p in range(12)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Study(folder, tokens, images, sae)


def run(
    study: Study,
    *callbacks: Callback,
    images_per_batch: int = 5,
    only: Selection | None = None,
    allow: list[str] | None = None,
    module: type[CodeReading] = SAEScoring,
    **trainer: object,
) -> None:
    """Score the study, or map its features, with these callbacks."""
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, **trainer}
    scorer = Trainer(callbacks=list(callbacks), enable_checkpointing=False, enable_model_summary=False, **options)
    data = ActivationData(study.tokens.folder, images_per_batch=images_per_batch, only=only)
    scorer.predict(module(study.folder / "sae", allow), data)


def all_scores(study: Study) -> torch.Tensor:
    """S in one piece, by its definition."""
    tokens = study.tokens.tokens_batch(range(len(study.tokens)))
    return study.sae.encode(tokens).detach().amax(dim=1)
