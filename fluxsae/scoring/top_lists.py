"""The images on which each feature is strongest, kept while images stream by.

Legend: B images of a batch, F features, K kept.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from jaxtyping import Float, Int
from lightning.pytorch import Trainer
from torch import Tensor

from fluxsae.runtime import gather_tensors

if _HAS_TRITON := find_spec("triton") is not None:
    from fluxsae.kernels import best_images


class TopList:
    """The `n_images` best images of every feature so far, the earlier image before the later among equals.

    Only images with S > 0 count. With `unique_prompts`, of each prompt only the best image does. The result is the same
    in whatever batches and order the images come: what a full list drops can never belong to the best again. `ids`
    tells it best first; after `add` on an NVIDIA GPU the fields themselves are in any order.
    """

    scores: Float[Tensor, "F K"]
    images: Int[Tensor, "F K"]
    prompts: Int[Tensor, "F K"]

    def __init__(
        self, n_features: int, n_images: int, unique_prompts: bool = True, device: torch.device | str = "cpu"
    ) -> None:
        self.unique_prompts = unique_prompts
        self._by_kernel = _HAS_TRITON and torch.device(device).type == "cuda" and torch.version.hip is None
        self.scores = torch.zeros(n_features, n_images, device=device, dtype=torch.float32)
        self.images = torch.full((n_features, n_images), -1, device=device)
        self.prompts = torch.full((n_features, n_images), -1, device=device)

    def add(self, images: Int[Tensor, "B"], prompts: Int[Tensor, "B"], scores: Float[Tensor, "B F"]) -> None:
        """Take note of a batch. Only features that it could improve are sorted again, few once lists are full."""
        scores = scores.float()
        if self._by_kernel:
            lists = self.images, self.prompts, self.scores
            best_images.keep_best(images, prompts, scores.contiguous(), *lists, self.unique_prompts)
            return
        rows = (scores.amax(dim=0) >= self.scores[:, -1]).nonzero().squeeze(1)
        rows = rows[scores.amax(dim=0)[rows] > 0]
        n = len(rows)
        self._merge(rows, images.expand(n, -1), prompts.expand(n, -1), scores.T[rows])

    def merge(self, images: Int[Tensor, "F K"], prompts: Int[Tensor, "F K"], scores: Float[Tensor, "F K"]) -> None:
        """Take note of another list's content."""
        rows = torch.arange(len(self.scores), device=self.scores.device)
        self._merge(rows, images, prompts, scores)

    def ids(self) -> list[list[int]]:
        """The image indices of every feature, best first; a feature active on fewer images has fewer."""
        order = self.images.argsort(dim=1, stable=True)
        order = order.gather(1, self.scores.gather(1, order).argsort(dim=1, descending=True, stable=True))
        return [[image for image in row if image >= 0] for row in self.images.gather(1, order).tolist()]

    def _merge(self, rows: Tensor, images: Tensor, prompts: Tensor, scores: Tensor) -> None:
        images = torch.cat([self.images[rows], images], dim=1)
        prompts = torch.cat([self.prompts[rows], prompts], dim=1)
        scores = torch.cat([self.scores[rows], scores], dim=1)
        order = images.argsort(dim=1, stable=True)
        order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))
        images, prompts, scores = (x.gather(1, order) for x in (images, prompts, scores))
        if self.unique_prompts:
            scores = scores.masked_fill(_repeats(prompts), 0)
        kept = scores.argsort(dim=1, descending=True, stable=True)[:, : self.scores.shape[1]]
        images, prompts, scores = (x.gather(1, kept) for x in (images, prompts, scores))
        empty = scores <= 0
        self.scores[rows] = scores.clamp_min(0)
        self.images[rows] = images.masked_fill(empty, -1)
        self.prompts[rows] = prompts.masked_fill(empty, -1)


def _repeats(prompts: Int[Tensor, "R K"]) -> Tensor:
    """Where a row's prompt has come before, as a mask [R, K]."""
    order = prompts.argsort(dim=1, stable=True)
    ordered = prompts.gather(1, order)
    same = torch.zeros_like(ordered, dtype=torch.bool)
    same[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(same).scatter(1, order, same)


def gather_top(trainer: Trainer, top: TopList) -> TopList:
    """The list over the images of all processes, the same in each of them."""
    parts = [gather_tensors(trainer, tensor) for tensor in (top.images, top.prompts, top.scores)]
    total = TopList(top.scores.shape[0], top.scores.shape[1], top.unique_prompts, top.scores.device)
    for images, prompts, scores in zip(*parts, strict=True):
        total.merge(images, prompts, scores)
    return total


class TopLists:
    """The lists of one run, for several callbacks: one is kept for each constraint, as long as the longest asked for.

    A shorter list is the beginning of a longer one.
    """

    def __init__(self) -> None:
        self._longest: dict[bool, int] = {}
        self._lists: dict[bool, TopList] = {}
        self._ids: dict[bool, list[list[int]]] = {}

    def ask(self, n_images: int, unique_prompts: bool = True) -> None:
        """Have a list kept from the first batch on."""
        self._longest[unique_prompts] = max(n_images, self._longest.get(unique_prompts, 0))

    def add(self, images: Int[Tensor, "B"], prompts: Int[Tensor, "B"], scores: Float[Tensor, "B F"]) -> None:
        """Take note of a batch."""
        for unique, n_images in self._longest.items():
            if unique not in self._lists:
                self._lists[unique] = TopList(scores.shape[1], n_images, unique, scores.device)
            self._lists[unique].add(images, prompts, scores)

    def ids(self, trainer: Trainer, n_images: int, unique_prompts: bool = True) -> list[list[int]]:
        """The images of every feature, best first, over all processes, which have to ask for it together."""
        if unique_prompts not in self._ids:
            self._ids[unique_prompts] = gather_top(trainer, self._lists[unique_prompts]).ids()
        return [images[:n_images] for images in self._ids[unique_prompts]]
