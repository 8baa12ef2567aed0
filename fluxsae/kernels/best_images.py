"""Keeps each feature's best images in one launch a batch (Triton), without asking the device what there is to do.

Why. A batch improves the lists of few features. PyTorch would have to ask the device which, and wait for the answer, or
sort the lists of all. Here each program takes one feature, sees that nothing of the batch is as good as its worst entry
and ends, or puts the better images in.

Legend: B images of a batch, F features, K kept.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

_FEATURES = 32
"""Lists of a program, which is a single warp."""


def keep_best(
    images: Int64[Tensor, "B"],
    prompts: Int64[Tensor, "B"],
    scores: Float[Tensor, "B F"],
    best_images: Int64[Tensor, "F K"],
    best_prompts: Int64[Tensor, "F K"],
    best_scores: Float[Tensor, "F K"],
    unique_prompts: bool,
) -> None:
    """Put a batch into the lists in place, as `TopList` means it; a list's entries come to be in any order.

    An image takes the place of its prompt's entry, or of the worst one, where it is better. The result does not depend
    on the order of images: what a full list drops can never belong to the best again. An empty place has image -1 and
    score 0.
    """
    n_features, n_kept = best_scores.shape
    _keep_best[(triton.cdiv(n_features, _FEATURES),)](
        *(images, prompts, scores, best_images, best_prompts, best_scores, len(images), n_features),
        N_KEPT=n_kept,
        PLACES=triton.next_power_of_2(n_kept),
        UNIQUE=unique_prompts,
        FEATURES=_FEATURES,
        num_warps=1,
    )


@no_type_check
@triton.jit
def _keep_best(
    images,
    prompts,
    scores,
    best_images,
    best_prompts,
    best_scores,
    n_images,
    n_features,
    N_KEPT: tl.constexpr,
    PLACES: tl.constexpr,
    UNIQUE: tl.constexpr,
    FEATURES: tl.constexpr,
):
    f = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    place = tl.arange(0, PLACES)[None, :]
    at = f.to(tl.int64)[:, None] * N_KEPT + place
    here = (f < n_features)[:, None] & (place < N_KEPT)
    # Places that only fill up to a power of two are better than any image.
    score = tl.load(best_scores + at, mask=here, other=float("inf"))
    image = tl.load(best_images + at, mask=here, other=-1)
    prompt = tl.load(best_prompts + at, mask=here, other=-1)
    least = tl.min(score, 1)
    of_image = scores + f
    for b in range(n_images):
        s = tl.load(of_image, mask=f < n_features, other=0.0)
        of_image += n_features
        if tl.max(((s > 0) & (s >= least)).to(tl.int32), 0) > 0:
            new, of = tl.load(images + b), tl.load(prompts + b)
            # The worst: of those with the least score the latest, of empty places the first.
            worst = score == least[:, None]
            latest = tl.max(tl.where(worst, image, -1), 1)
            target = tl.min(tl.where(worst & (image == latest[:, None]), place, PLACES), 1)
            if UNIQUE:
                same = (prompt == of) & (image >= 0)
                own = tl.min(tl.where(same, place, PLACES), 1)
                target = tl.where(own < PLACES, own, target)
            chosen = place == target[:, None]
            old_score = tl.sum(tl.where(chosen, score, 0.0), 1)
            old_image = tl.sum(tl.where(chosen, image, 0), 1)
            better = (s > 0) & ((s > old_score) | ((s == old_score) & (new < old_image)))
            replaced = chosen & better[:, None]
            score = tl.where(replaced, s[:, None], score)
            image = tl.where(replaced, new, image)
            prompt = tl.where(replaced, of, prompt)
            least = tl.min(score, 1)
    tl.store(best_scores + at, score, mask=here)
    tl.store(best_images + at, image, mask=here)
    tl.store(best_prompts + at, prompt, mask=here)
