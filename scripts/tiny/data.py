"""A pool of scenes with tokenised captions, made once from a seed and kept on the training device.

Shapes: N scenes, L text tokens.
"""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from scripts.tiny.scenes import Scene, SceneTensors, random_caption, to_tensors
from scripts.tiny.text import TEXT_LENGTH, clip_tokenizer, t5_tokenizer

CHUNK = 5000


class Pool(NamedTuple):
    """Scenes and one caption of each, as token ids of both tokenizers."""

    scenes: SceneTensors
    t5_ids: Int[Tensor, "N L"]
    clip_ids: Int[Tensor, "N L"]

    def pick(self, index: Int[Tensor, "B"]) -> Pool:
        scenes = SceneTensors(*(column[index] for column in self.scenes))
        return Pool(scenes, self.t5_ids[index], self.clip_ids[index])

    def to(self, device: torch.device) -> Pool:
        scenes = SceneTensors(*(column.to(device) for column in self.scenes))
        return Pool(scenes, self.t5_ids.to(device), self.clip_ids.to(device))


def build_pool(n: int, seed: int, n_processes: int = 1, clip: Path | None = None) -> Pool:
    """`n` scenes (rounded up to whole chunks) with captions that no test holds out; the same for any `n_processes`.

    CLIP's token ids are those of the tokenizer in the folder `clip`, or of a new one.
    """
    seeds = [seed * 1_000_003 + chunk for chunk in range(-(-n // CHUNK))]
    if n_processes == 1:
        chunks = [_chunk(clip, s) for s in seeds]
    else:
        with ProcessPoolExecutor(n_processes) as executor:
            chunks = list(executor.map(partial(_chunk, clip), seeds))
    scenes = SceneTensors(*(torch.cat(columns) for columns in zip(*(c.scenes for c in chunks), strict=True)))
    return Pool(scenes, torch.cat([c.t5_ids for c in chunks]), torch.cat([c.clip_ids for c in chunks]))


def tokenise(captions: list[str], clip: Path | None = None) -> tuple[Tensor, Tensor]:
    """T5 and CLIP token ids, both [N, L]; CLIP's tokenizer from the folder `clip`, or a new one."""
    options = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True, "return_tensors": "pt"}
    return t5_tokenizer()(captions, **options).input_ids, clip_tokenizer(clip)(captions, **options).input_ids


def _chunk(clip: Path | None, seed: int) -> Pool:
    rng = random.Random(seed)
    pairs = [random_caption(rng, held_out=False) for _ in range(CHUNK)]
    scenes: list[Scene] = [scene for scene, _ in pairs]
    t5_ids, clip_ids = tokenise([caption.text for _, caption in pairs], clip)
    return Pool(to_tensors(scenes), t5_ids, clip_ids)
