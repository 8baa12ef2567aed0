"""Encodes whole images and pools their codes over tokens, so that codes of all tokens never are in memory together.

Legend: B images, T tokens an image, P tokens of a part, N = B · T tokens, D width, F features, M some of them, K kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fluxsae.sae.base import SAE, ThresholdForm

if find_spec("triton") is not None:
    from fluxsae.kernels import columns, pooling, selection

PART = 8192
"""Tokens whose pre-activations are in memory together: 0.4 GB of float32 for 12,288 features."""


class Pooled(NamedTuple):
    """The largest code of each feature over an image's tokens, in float32, and on how many of these it is above 0."""

    scores: Float[Tensor, "B F"]
    fired: Int[Tensor, "B F"]


class Pooling(ABC):
    """How an SAE's codes are pooled; codes of chosen features come from the same arithmetic as their maxima."""

    @abstractmethod
    def pool(self, tokens: Float[Tensor, "B T D"]) -> Pooled:
        """The codes of some images, pooled over tokens."""

    @abstractmethod
    def codes(self, tokens: Float[Tensor, "T D"], features: Int[Tensor, "M"]) -> Float[Tensor, "T M"]:
        """The codes of some features on one image, in float32."""


def pooling_of(sae: SAE, precision: str) -> Pooling:
    """The fastest way to pool here: PyTorch, or kernels where the kind has a form for them.

    Kernels run on an NVIDIA GPU at the Trainer's precision `bf16-mixed`.
    """
    on_gpu = sae.W_enc.device.type == "cuda" and torch.version.hip is None
    if on_gpu and precision == "bf16-mixed" and find_spec("triton") is not None:
        if (k := sae.top_k_form()) is not None:
            return TopKPooling(sae, k)
        if (form := sae.threshold_form()) is not None:
            return ThresholdPooling(sae, form)
    return PlainPooling(sae)


class PlainPooling(Pooling):
    """What pooling means, by the SAE's own `encode`, a part of the tokens at a time."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae

    @torch.no_grad()
    def pool(self, tokens: Float[Tensor, "B T D"]) -> Pooled:
        size = max(1, PART // tokens.shape[1])
        if size == 1:
            return _stacked([self._one_image(image) for image in tokens])
        return _stacked([_pooled(self.sae.encode(part)) for part in tokens.split(size)])

    @torch.no_grad()
    def codes(self, tokens: Float[Tensor, "T D"], features: Int[Tensor, "M"]) -> Float[Tensor, "T M"]:
        return torch.cat([self.sae.encode(part)[:, features].float() for part in tokens.split(PART)])

    def _one_image(self, tokens: Float[Tensor, "T D"]) -> Pooled:
        parts = [_pooled(self.sae.encode(part)[None]) for part in tokens.split(PART)]
        scores = torch.cat([part.scores for part in parts]).amax(dim=0, keepdim=True)
        return Pooled(scores, torch.cat([part.fired for part in parts]).sum(dim=0, keepdim=True, dtype=torch.int32))


def _pooled(codes: Float[Tensor, "B P F"]) -> Pooled:
    return Pooled(codes.amax(dim=1).float(), (codes > 0).sum(dim=1, dtype=torch.int32))


def _stacked(parts: list[Pooled]) -> Pooled:
    return Pooled(torch.cat([part.scores for part in parts]), torch.cat([part.fired for part in parts]))


class ThresholdPooling(Pooling):
    """Pools inside the encoder's product, where a code depends on its own pre-activation alone.

    The scale is folded into the weights, so that tokens of `dtype` are multiplied as they were captured, exactly. The
    bias takes the mean through the *rounded* weights, so rounding errs in proportion to x - mean, however far the mean
    is from 0. Tokens of another dtype are centred before they are rounded.
    """

    def __init__(self, sae: SAE, form: ThresholdForm, dtype: torch.dtype = torch.bfloat16) -> None:
        self.weight = (form.weight.detach() * sae.scale).to(dtype)
        self.centre = sae.mean + sae.b_dec.detach() / sae.scale
        self.bias = form.bias.detach()
        self.bias_of_raw = self.bias - self.weight.float() @ self.centre
        self.threshold = form.thresholds.detach()

    def pool(self, tokens: Float[Tensor, "B T D"]) -> Pooled:
        pooled = _empty(len(tokens), len(self.weight), tokens.device)
        x, bias = self._inputs(tokens)
        pooling.pool_thresholded(x.contiguous(), self.weight, bias, self.threshold, *pooled)
        return pooled

    def codes(self, tokens: Float[Tensor, "T D"], features: Int[Tensor, "M"]) -> Float[Tensor, "T M"]:
        x, bias = self._inputs(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            pre_acts = x.float() @ self.weight[features].float().T + bias[features]
        return torch.where(pre_acts <= self.threshold[features], 0.0, pre_acts)

    def _inputs(self, tokens: Float[Tensor, "*batch D"]) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "F"]]:
        """What to multiply by the weights, and the bias that belongs to it."""
        if tokens.dtype == self.weight.dtype:
            return tokens, self.bias_of_raw
        return (tokens - self.centre).to(self.weight.dtype), self.bias


class TopKPooling(Pooling):
    """Pools the k codes of each token, which are chosen from pre-activations of a part of the tokens.

    These are rounded to `dtype`, as in a fused training step; so are the scores.
    """

    def __init__(self, sae: SAE, k: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.sae = sae
        self.k = k
        self.weight = sae.W_enc.detach().to(dtype)

    def pool(self, tokens: Float[Tensor, "B T D"]) -> Pooled:
        n_images, n_tokens, _ = tokens.shape
        pooled = _empty(n_images, self.sae.n_features, tokens.device)
        for field in pooled:
            field.zero_()
        size = PART * 4 // self.weight.itemsize  # as many bytes of pre-activations as in float32
        for i, part in enumerate(tokens.flatten(0, 1).split(size)):
            pooling.pool_chosen(*self._chosen(part), i * size, n_tokens, *pooled)
        return pooled

    def codes(self, tokens: Float[Tensor, "T D"], features: Int[Tensor, "M"]) -> Float[Tensor, "T M"]:
        return torch.cat([self._dense(part)[:, features] for part in tokens.split(PART)])

    def _chosen(self, tokens: Float[Tensor, "P D"]) -> tuple[Float[Tensor, "P K"], Int[Tensor, "P K"]]:
        x = torch.empty_like(tokens, dtype=self.weight.dtype)
        columns.centre(tokens.contiguous(), self.sae.mean, self.sae.scale, self.sae.b_dec, x)
        values = torch.empty(len(x), self.k, device=x.device)
        indices = torch.empty(len(x), self.k, device=x.device, dtype=torch.int32)
        selection.select(x @ self.weight.T, self.sae.b_enc.detach(), values, indices)
        return values, indices

    def _dense(self, tokens: Float[Tensor, "P D"]) -> Float[Tensor, "P F"]:
        values, indices = self._chosen(tokens)
        dense = torch.zeros(len(tokens), self.sae.n_features, device=values.device)
        return dense.scatter_reduce_(1, indices.long(), values, "amax")  # what fills rows up is 0 at 0


def _empty(n_images: int, n_features: int, device: torch.device) -> Pooled:
    scores = torch.empty(n_images, n_features, device=device)
    return Pooled(scores, torch.empty(n_images, n_features, device=device, dtype=torch.int32))
